"""What the Trainer reads: labels on the answer and its end alone, and nothing lost without a count."""

from __future__ import annotations

import json

import pytest
from support.training_runs import write_samples

from examples.dialogue.encoding import calibration_text, dialogue_data, encode, load_data, text_data
from examples.dialogue.schema import Sample, read_jsonl, write_jsonl
from examples.dialogue.settings import DataSettings
from svdconvert.errors import InputError
from svdconvert.models.tokenizer import load_tokenizer

DATA = DataSettings(template="multidoc2dial-unmarked", max_length=60)


@pytest.fixture(scope="module")
def tokenizer(dense):
    return load_tokenizer(dense)


def test_labels_are_the_answer_and_the_end(tokenizer):
    sample = Sample("a_1", "a", passage="p", question="q", answer="yes")
    row = encode(sample, tokenizer, DATA)
    counted = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(counted[:-1]) == "yes"  # this tokenizer has no space
    assert counted[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row["input_ids"][: -len(counted)]) == "p<I></I><q>q</q>"
    assert row["labels"][: -len(counted)] == [-100] * (len(row["input_ids"]) - len(counted))
    whole = encode(sample, tokenizer, DataSettings(template="multidoc2dial-unmarked", answer_only=False))
    assert whole["labels"] == whole["input_ids"] == row["input_ids"]


def test_what_is_dropped_is_counted(tokenizer, tmp_path):
    short = Sample("a_1", "a", passage="", question="q", answer="yes")
    samples = [
        short,
        Sample("b_1", "b", passage="x" * 80, question="q", answer="yes"),
        Sample("c_1", "c", passage="", question="q", answer="y" * 30),
    ]
    path = tmp_path / "a.jsonl"
    write_jsonl(path, samples)
    path.write_text(path.read_text() + "{}\n")
    data = DataSettings(template="multidoc2dial-unmarked", max_length=60, max_answer=20)
    found = dialogue_data(path, tokenizer, data, 0, 0)
    assert found.samples == [short]
    reasons = {"malformed": 1, "longer than 60 tokens": 1, "answer longer than 20 tokens": 1}
    assert dict(found.dropped) == reasons
    with pytest.raises(InputError, match="no grounding span"):
        dialogue_data(path, tokenizer, DataSettings(template="multidoc2dial-unmarked", passage="span"), 0, 0)


def test_the_limit_is_chosen_by_the_seed(tokenizer, tmp_path):
    path = write_samples(tmp_path / "a.jsonl", 20, "t")
    first, again, other = (dialogue_data(path, tokenizer, DATA, 5, seed).samples for seed in (0, 0, 1))
    assert len(first) == 5
    assert first == again
    assert first != other


def test_a_dialogue_on_both_sides_is_refused(tokenizer, tmp_path):
    path = write_samples(tmp_path / "a.jsonl", 3, "t")
    data = DataSettings(train=str(path), validation=str(path), template="multidoc2dial-unmarked")
    with pytest.raises(InputError, match="share 3 dialogues"):
        load_data(data, tokenizer, 0)


def test_windows_of_raw_text(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("abcdefg", "hijklm", "nop")))
    found = text_data(path, tokenizer, 6, 0, 0)
    joined = tokenizer.decode([token for row in found.rows for token in row["input_ids"]])
    end = tokenizer.eos_token
    assert joined == f"abcdefg{end}hijklm{end}nop{end}"[: len(joined)]
    assert [len(row["input_ids"]) for row in found.rows] == [6, 6, 6]
    assert all(row["labels"] == row["input_ids"] for row in found.rows)
    assert found.dropped == {"tokens after the last whole window": 1}
    with pytest.raises(InputError, match="19 tokens, less than one window of 64"):
        text_data(path, tokenizer, 64, 0, 0)


def test_calibration_reads_what_training_reads(tokenizer, tmp_path):
    samples, _ = read_jsonl(write_samples(tmp_path / "a.jsonl", 2, "t"))
    lines = calibration_text(samples, DATA, tmp_path / "c.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["<I> </I> <q> q0 </q> yes", "<I> </I> <q> q1 </q> no"]
