"""Answers in batches: the same as one by one, continued after a break, and refused where they could not be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.dialogue.generation import Decoding, generate
from examples.dialogue.predictions import pair, read_predictions, read_rows
from examples.dialogue.schema import Sample
from examples.dialogue.templates import render
from svdconvert.errors import InputError, JobError

TINY = Path(__file__).parents[2] / "examples" / "tiny_polyglot"
SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    from svdconvert.models.loading import load_model
    from svdconvert.models.tokenizer import load_tokenizer

    return load_model(TINY / "model", "cpu", torch.float32), load_tokenizer(TINY / "model")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    questions = [
        "이 영화는 어떤가요?",
        "재미있나요? 배우들의 연기는 괜찮았나요?",
        "몇 점을 줄까요?",
        "왜?",
        "누가 나오나요?",
    ]
    return [Sample(f"d_{n}", "d", "", question, "좋아요.") for n, question in enumerate(questions)]


@pytest.fixture
def run(tiny: tuple[Any, Any], samples: list[Sample], tmp_path: Path) -> Callable[..., Any]:
    def call(**changes: Any) -> Any:
        model = changes.pop("model", tiny[0])
        given = changes.pop("samples", samples)
        options = {"template": "kodoc2dial-short", "decoding": SHORT, "batch_size": 2, "name": "tiny", **changes}
        return generate(model, tiny[1], given, tmp_path / "answers.jsonl", **options)

    return call


class Breaking:
    """A model that breaks off when it is asked for a batch too many."""

    def __init__(self, model: Any, batches: int, error: BaseException) -> None:
        self._model, self._left, self._error = model, batches, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **options: Any) -> Any:
        if not self._left:
            raise self._error
        self._left -= 1
        return self._model.generate(**options)


def test_batches_answer_as_one_prompt_at_a_time(
    tiny: tuple[Any, Any], samples: list[Sample], run: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny
    rows = run()
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        prompt = render(sample, "kodoc2dial-short").prompt
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
        expected = []
        for _ in range(SHORT.max_new_tokens):
            # Greedy decoding by hand, without a cache.
            token = int(
                model(input_ids=torch.cat([ids, torch.tensor([expected], dtype=torch.int64)], 1)).logits[0, -1].argmax()
            )
            if token == tokenizer.eos_token_id:
                break
            expected.append(token)
        assert row["prediction"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert (row["prompt_tokens"], row["new_tokens"]) == (ids.shape[1], len(expected))
        assert row["finished"] == (len(expected) < SHORT.max_new_tokens)
    settings, read = read_predictions(tmp_path / "answers.jsonl")
    assert read == {row["id"]: row["prediction"] for row in rows}
    assert settings["decoding"]["max_new_tokens"] == 6
    assert (settings["model"], settings["template"], settings["dtype"]) == ("tiny", "kodoc2dial-short", "float32")
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("sampling", [False, True])
def test_a_broken_run_goes_on(run: Callable[..., Any], tiny: tuple[Any, Any], tmp_path: Path, sampling: bool) -> None:
    decoding = Decoding(max_new_tokens=6, do_sample=sampling, temperature=0.9, top_p=0.95, seed=3)
    with pytest.raises(JobError, match="goes on"):
        run(model=Breaking(tiny[0], 2, KeyboardInterrupt()), decoding=decoding)
    assert not (tmp_path / "answers.jsonl").exists()
    partial = tmp_path / "answers.jsonl.partial"
    assert len(read_rows(partial)[1]) == 4
    # A kill in the middle of a line.
    partial.write_bytes(partial.read_bytes()[:-20])
    counted = Breaking(tiny[0], 2, AssertionError("done batches are not done again"))
    rows = run(model=counted, decoding=decoding)
    assert run(decoding=decoding) == rows
    whole = run(decoding=decoding, overwrite=True, name="again")
    assert whole == rows


def test_memory_that_does_not_suffice_is_said(run: Callable[..., Any], tiny: tuple[Any, Any]) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(JobError, match="smaller --batch-size"):
        run(model=Breaking(tiny[0], 1, error))
    assert len(run(batch_size=1)) == 5


def test_other_settings_are_not_mixed(run: Callable[..., Any], tiny: tuple[Any, Any]) -> None:
    with pytest.raises(JobError):
        run(model=Breaking(tiny[0], 1, KeyboardInterrupt()))
    with pytest.raises(InputError, match="begun with another decoding"):
        run(decoding=Decoding(max_new_tokens=7))
    with pytest.raises(InputError, match="begun with another identity"):
        run(identity="trained further")
    first = run()
    with pytest.raises(InputError, match="made with another model"):
        run(name="other")
    assert run() == first
    assert len(run(name="other", overwrite=True)) == 5


def test_prompts_that_do_not_fit_are_refused(run: Callable[..., Any], samples: list[Sample]) -> None:
    with pytest.raises(InputError, match="5 prompts with 500 new tokens exceed the model's 512 positions"):
        run(decoding=Decoding(max_new_tokens=500))
    with pytest.raises(InputError, match="two samples have the same id"):
        run(samples=[*samples, samples[0]])
    with pytest.raises(InputError, match="no samples"):
        run(samples=[])


def test_the_models_own_generation_settings_are_not_used(
    run: Callable[..., Any], tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = run()
    for name, value in (("do_sample", True), ("temperature", 5.0), ("repetition_penalty", 9.0), ("num_beams", 3)):
        monkeypatch.setattr(tiny[0].generation_config, name, value)
    assert run(overwrite=True, name="again") == greedy


def test_factored_models_answer_too(tmp_path: Path, samples: list[Sample]) -> None:
    from examples.dialogue.generate import identity_of, load_for_generation
    from svdconvert import convert

    folder = tmp_path / "r72"
    convert(TINY / "model", folder, rank=72, device="cpu")
    model, tokenizer = load_for_generation(folder, "cpu", "float32")
    assert type(model).__name__.endswith("SVDForCausalLM")
    rows = generate(model, tokenizer, samples[:2], tmp_path / "a.jsonl", template="kodoc2dial-short", decoding=SHORT)
    assert all(row["prediction"] for row in rows)
    before = identity_of(folder)
    assert before != identity_of(TINY / "model")
    (folder / "config.json").touch()
    assert identity_of(folder) != before


def test_predictions_and_samples_are_paired_by_id(samples: list[Sample]) -> None:
    given = {sample.id: f"답 {sample.id}" for sample in reversed(samples)}
    assert pair(given, samples) == ([f"답 d_{n}" for n in range(5)], ["좋아요."] * 5)
    with pytest.raises(InputError, match="1 predictions belong to no sample"):
        pair({**given, "x": ""}, samples)
    del given["d_2"]
    with pytest.raises(InputError, match=r"1 of 5 samples have no prediction \(first d_2\)"):
        pair(given, samples)
    assert len(pair(given, samples, partial=True)[0]) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a"}', "line 1: the field 'prediction' is missing"),
        ('{"id": 1, "prediction": ""}', "line 1: the field 'id' is missing or no text"),
        ('{"id": "a", "prediction": ""}\n{"id": "a", "prediction": ""}', "line 2: the id 'a' was there before"),
        ('{"id": "a", "prediction": ""}\n\n{"settings": {}}', "line 3: the field 'id'"),
        ("[]", "line 1"),
        ("nonsense", "line 1, is not valid JSON"),
    ],
)
def test_malformed_predictions(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_predictions(path)


def test_files_of_others_need_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"id": "a", "prediction": ""}))
    assert read_predictions(path) == ({}, {"a": ""})
