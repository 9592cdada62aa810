"""Samples out of the published forms, and their counts; set SVDCONVERT_DIALOGUE_DATA for the real files."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support import raw_dialogues

from examples.dialogue.filters import Limits, keep_apart, shape, split
from examples.dialogue.loading import load, load_documents, published_files
from examples.dialogue.schema import Report, Sample
from svdconvert.errors import InputError


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Any:
    return load_documents(write(tmp_path / "documents.json", raw_dialogues.documents()))


def test_multidoc2dial(tmp_path: Path, documents: Any) -> None:
    samples, report = load(write(tmp_path / "dialogues.json", raw_dialogues.multidoc2dial()), documents, "ko")
    assert [sample.id for sample in samples] == ["d0_1", "d0_5", "d0_7"]
    assert report.dropped == {"a user turn that no agent turn follows": 2, "the agent has no solution": 1}
    first, second, third = samples
    assert first.history == ()
    assert first.question == "전입신고는 언제까지 하나요?"
    assert first.answer == "이사하고 14일 안에 하세요."
    assert first.passage[slice(*first.grounding)] == "전입신고는 이사한 날부터 14일 안에 합니다."
    assert first.passage[slice(*first.section)] == (
        "전입신고는 이사한 날부터 14일 안에 합니다. 늦으면 과태료를 냅니다."
    )
    # Two spans in two sections: the grounding and the section go from the first to the last.
    assert second.passage[slice(*second.grounding)] == "늦으면 과태료를 냅니다.\n\n온라인 신고\n정부24에서 신고합니다."
    assert second.passage[slice(*second.section)] == raw_dialogues.TEXT.split("\n\n", 1)[1]
    assert [role for role, _ in second.history] == ["user", "agent", "user", "user"]
    assert (third.doc_id, third.title, third.passage) == ("여권", "여권 문서", raw_dialogues.OTHER)
    assert {sample.dialogue_id for sample in samples} == {"d0"}
    assert third.language == "ko"


def test_doc2dial_gives_the_same_samples(tmp_path: Path, documents: Any) -> None:
    by_domain, _ = load(write(tmp_path / "a.json", raw_dialogues.multidoc2dial()), documents)
    by_document, report = load(write(tmp_path / "b.json", raw_dialogues.doc2dial()), documents)
    assert by_document == by_domain[:2]
    assert report.kept == 2


def test_paragraphs_stand_for_sections_that_are_not_named(tmp_path: Path) -> None:
    plain = load_documents(write(tmp_path / "documents.json", raw_dialogues.documents(sections=False)))
    path = write(tmp_path / "dialogues.json", raw_dialogues.multidoc2dial())
    samples, report = load(path, plain)
    named, _ = load(path, load_documents(write(tmp_path / "named.json", raw_dialogues.documents())))
    assert samples == named
    assert sum(report.notes.values()) == 3


def test_without_documents_samples_have_no_passage(tmp_path: Path) -> None:
    data = raw_dialogues.multidoc2dial()
    for turn in data["dial_data"]["민원"][0]["turns"]:
        turn["role"] = {"agent": "system"}.get(turn["role"], turn["role"])
    samples, _ = load(write(tmp_path / "dialogues.json", data))
    assert [(sample.passage, sample.spans, sample.doc_id) for sample in samples][-1] == ("", (), "여권")
    assert samples[1].history[1] == ("agent", "이사하고 14일 안에 하세요.")


def test_drops_are_counted_by_reason(tmp_path: Path, documents: Any) -> None:
    data = raw_dialogues.multidoc2dial(dialogues=2)
    first, second = data["dial_data"]["민원"]
    first["turns"][1]["references"][0]["id_sp"] = "77"
    second["turns"][6]["references"][0]["doc_id"] = "등본"
    second["turns"][5]["utterance"] = " "
    data["dial_data"]["민원"].append(first)
    samples, report = load(write(tmp_path / "dialogues.json", data), documents)
    assert [sample.id for sample in samples] == ["d0_5", "d0_7", "d1_1"]
    assert report.dropped == {
        "a user turn that no agent turn follows": 6,
        "the agent has no solution": 3,
        "the answer's spans are not in the document": 2,
        "the document is not among the documents": 1,
        "question or answer is empty": 1,
        "the same dialogue and turn were there before": 2,
    }


def test_malformed_dialogues_cost_only_themselves(tmp_path: Path, documents: Any) -> None:
    data = raw_dialogues.multidoc2dial(dialogues=4)
    group = data["dial_data"]["민원"]
    del group[0]["turns"][2]["utterance"]
    group[1]["turns"][4]["role"] = "bot"
    del group[2]["dial_id"]
    group.append("d9")
    samples, report = load(write(tmp_path / "dialogues.json", data), documents)
    assert {sample.dialogue_id for sample in samples} == {"d3"}
    assert [(problem.where, problem.field) for problem in report.problems] == [
        ("dial_data['민원'][0] (d0)", "turns[2].utterance"),
        ("dial_data['민원'][1] (d1)", "turns[4].role"),
        ("dial_data['민원'][2]", "dial_id"),
        ("dial_data['민원'][4]", ""),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no object dial_data"),
        ('{"dial_data": []}', "no object dial_data"),
        ('{"dial_data": {}}', "gives no sample; it has no dialogues"),
        ('{"dial_data": {"ssa": 3}}', "is no object"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "dialogues.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    "content", ['{"doc_data": []}', '{"doc_data": {"ssa": {"a": {}}}}', '{"doc_data": {"ssa": []}}']
)
def test_other_documents_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "documents.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"documents\.json"):
        load_documents(path)


def test_a_folder_with_the_published_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has none of the files"):
        published_files(tmp_path)
    for name in ("doc2dial_dial_train.json", "doc2dial_doc.json"):
        (tmp_path / name).write_text("{}")
    found = published_files(tmp_path)
    assert [path and path.name for path in found] == ["doc2dial_dial_train.json", None, "doc2dial_doc.json"]


class Words:
    """A tokenizer of words."""

    def __call__(self, text: str, **_: object) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


def many(count: int, per_dialogue: int = 3) -> list[Sample]:
    """Samples whose answers have 1, 2, 3, ... words."""
    return [
        Sample(
            id=f"d{n // per_dialogue}_{n}",
            dialogue_id=f"d{n // per_dialogue}",
            passage="문서 본문",
            question="질문",
            answer=" ".join(["답"] * (n + 1)),
            history=tuple([("user", "말")] * n),
            doc_id=f"doc{n % 4}",
        )
        for n in range(count)
    ]


def test_lengths_decide_and_are_told() -> None:
    report = Report("x")
    # Prompt: [문서] 문서 본문 [대화 기록] 없음 [질문] 질문 [답변], where [대화 기록] is two words: 9 words, of
    # which a history takes one away and adds two for each of its turns.
    kept = shape(
        many(6),
        report,
        passage="document",
        template="kodoc2dial-short",
        limits=Limits(total=20, answer=4),
        tokenizer=Words(),
    )
    assert [len(sample.answer.split()) for sample in kept] == [1, 2, 3, 4]
    assert report.dropped == {"an answer of more than 4 tokens": 2}
    assert report.lengths["answer"] == {"median": 3, "90 %": 4, "99 %": 4, "longest": 4}
    assert report.lengths["total"]["longest"] == (9 - 1 + 2 * 3) + 4 + 1
    report = Report("x")
    limits = Limits(total=18, passage=2, turns=1)
    kept = shape(many(6), report, passage="document", template="kodoc2dial-short", limits=limits, tokenizer=Words())
    # With one turn of history: 10 words of prompt, the answer and the end-of-text token.
    assert [len(sample.answer.split()) for sample in kept] == [1, 2, 3, 4, 5, 6]
    assert all(len(sample.history) <= 1 for sample in kept)
    assert report.notes == {"the history was shortened to 1 turns": 4}
    limits = Limits(total=16, turns=1)
    kept = shape(
        many(6), Report("x"), passage="document", template="kodoc2dial-short", limits=limits, tokenizer=Words()
    )
    assert [len(sample.answer.split()) for sample in kept] == [1, 2, 3, 4, 5]


def test_what_a_template_or_a_passage_needs() -> None:
    report = Report("x")
    assert shape(many(3), report, passage="section", template="kodoc2dial", limits=Limits()) == []
    assert report.dropped == {"no section to cut the passage to": 3}
    report = Report("x")
    assert shape(many(3), report, passage="document", template="multidoc2dial", limits=Limits()) == []
    assert report.dropped == {"no grounding span to mark": 3}
    with pytest.raises(InputError, match="--tokenizer"):
        shape(many(3), Report("x"), passage="document", template="kodoc2dial", limits=Limits(total=9))


@pytest.mark.parametrize("by", ["dialogue", "document"])
@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_sides_share_no_group(by: str, fraction: float) -> None:
    samples = many(40)
    train, validation = split(samples, fraction, seed=3, by=by)

    def groups(side: list[Sample]) -> set[str]:
        return {sample.dialogue_id if by == "dialogue" else sample.doc_id for sample in side}

    assert not groups(train) & groups(validation)
    assert sorted(train + validation, key=lambda s: s.id) == sorted(samples, key=lambda s: s.id)
    assert len(groups(validation)) == max(1, round(len(groups(samples)) * fraction))
    assert split(samples, fraction, seed=3, by=by) == (train, validation)
    assert split(list(reversed(samples)), fraction, seed=3, by=by)[1] == list(reversed(validation))


def test_seeds_differ_and_impossible_splits_are_refused() -> None:
    assert split(many(40), 0.3, seed=1) != split(many(40), 0.3, seed=2)
    for samples, fraction in ((many(3), 0.5), (many(40), 0.0), (many(40), 1.0)):
        with pytest.raises(InputError, match="leaves no training or no validation data"):
            split(samples, fraction)


def test_training_leaves_validation_dialogues_alone() -> None:
    report = Report("x", kept=9)
    kept = keep_apart(many(9), many(3), report)
    assert {sample.dialogue_id for sample in kept} == {"d1", "d2"}
    assert (report.kept, report.dropped) == (6, {"the dialogue is in the validation data too": 3})


REAL = Path(os.environ.get("SVDCONVERT_DIALOGUE_DATA", ""))


@pytest.mark.skipif(not os.environ.get("SVDCONVERT_DIALOGUE_DATA"), reason="SVDCONVERT_DIALOGUE_DATA names no folder")
def test_the_real_data() -> None:
    """Doc2Dial's validation data gives the 3,311 response pairs, pair by pair; MultiDoc2Dial's dummy test gives 5."""
    documents = load_documents(REAL / "doc2dial" / "doc2dial_val_docs.rebuilt.json")
    samples, _ = load(REAL / "doc2dial" / "doc2dial_val_dial.rebuilt.json", documents)
    by_id = {sample.id: sample for sample in samples}
    with gzip.open(REAL / "doc2dial" / "doc2dial_val_response_pairs.jsonl.gz", "rt", encoding="utf-8") as handle:
        pairs = [json.loads(line) for line in handle]
    assert len(pairs) == len(samples) == 3311
    for pair in pairs:
        sample = by_id[f"{pair['dial_id']}_{pair['turn'] - 1}"]
        assert sample.answer == pair["response"].strip()
        assert [text for _, text in sample.history] + [sample.question] == [
            turn["utterance"].strip() for turn in pair["history"]
        ]
    multi = REAL / "multidoc2dial"
    assert len(load(multi / "multidoc2dial_dial_test.json")[0]) == 5
    assert len(load(multi / "multidoc2dial_dial_small_train.json")[0]) == 33
    assert len(load(REAL / "manual2dial_ko" / "manual2dial_dial_validation.json")[0]) == 2457
