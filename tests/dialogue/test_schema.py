"""Samples and their file: what is malformed is named by line and field, and nothing else is lost."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.dialogue.schema import FieldError, Sample, parse_sample, read_jsonl, write_jsonl
from svdconvert.errors import InputError

GOOD: dict[str, Any] = {
    "id": "d1_3",
    "passage": "전입신고는 14일 안에 합니다. 늦으면 과태료를 냅니다.",
    "spans": [[0, 16]],
    "section": [0, 30],
    "dialogue": [{"role": "user", "text": "안녕하세요"}, {"role": "agent", "text": "네, 무엇을 도와드릴까요?"}],
    "question": "언제까지 하나요?",
    "answer": "14일 안에 하세요.",
    "language": "ko",
}


def lines(path: Path, *entries: Any) -> Path:
    """A file with these lines; text is written as it is."""
    rows = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def test_a_sample_survives_its_file(tmp_path: Path) -> None:
    sample = parse_sample(GOOD)
    assert sample.dialogue_id == "d1"
    assert sample.grounding == (0, 16)
    assert sample.history[0] == ("user", "안녕하세요")
    assert write_jsonl(tmp_path / "a" / "samples.jsonl", [sample]) == 1
    read, report = read_jsonl(tmp_path / "a" / "samples.jsonl")
    assert read == [sample]
    assert (report.kept, report.dropped.total()) == (1, 0)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    ("entry", "field", "reason"),
    [
        (without("answer"), "answer", "is missing"),
        (without("passage"), "passage", "is missing"),
        ({**GOOD, "question": "  "}, "question", "is empty"),
        ({**GOOD, "answer": 3}, "answer", "is a number, not text"),
        ({**GOOD, "title": None}, "title", "is null, not text"),
        ({**GOOD, "spans": [[0, 99]]}, "spans", "outside"),
        ({**GOOD, "spans": [[4, 4]]}, "spans", "outside"),
        ({**GOOD, "spans": [[0, 1.5]]}, "spans", "not [start, end]"),
        ({**GOOD, "spans": [[False, True]]}, "spans", "not [start, end]"),
        ({**GOOD, "spans": "0-4"}, "spans", "is text, not a list"),
        ({**GOOD, "section": [5]}, "section", "not [start, end]"),
        ({**GOOD, "dialogue": [{"role": "bot", "text": "네"}]}, "dialogue", "'bot'"),
        ({**GOOD, "dialogue": [{"role": "user"}]}, "dialogue", "without text"),
        ({**GOOD, "dialogue": ["네"]}, "dialogue", "not an object"),
        ({**GOOD, "dialogue": {}}, "dialogue", "is an object, not a list"),
        ({**GOOD, "answer": "\ud83d"}, "answer", "surrogate"),
        (["d1_3"], "", "is a list, not an object"),
    ],
)
def test_malformed_entries_name_their_field(entry: Any, field: str, reason: str) -> None:
    with pytest.raises(FieldError) as error:
        parse_sample(entry)
    assert error.value.field == field
    assert reason in error.value.reason


def test_malformed_lines_cost_only_themselves(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "samples.jsonl", GOOD, "{not json", without("answer"), "", GOOD, {**GOOD, "id": "d2_1", "pasage": ""}
    )
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    samples, report = read_jsonl(path)
    assert [sample.id for sample in samples] == ["d1_3", "d2_1"]
    assert report.dropped == {"malformed": 4}
    found = [(problem.where, problem.field) for problem in report.problems]
    assert found == [("line 2", ""), ("line 3", "answer"), ("line 5", "id"), ("line 7", "")]
    assert report.notes == {"unknown field 'pasage' is ignored": 1}
    assert "line 3, field 'answer': is missing" in str(report)


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no usable sample; line 1, field 'answer': is missing"):
        read_jsonl(lines(tmp_path / "samples.jsonl", without("answer")))
    with pytest.raises(InputError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "samples.jsonl", GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_jsonl(path)[0] == [parse_sample(GOOD)]


def test_decomposed_hangul_is_composed_and_spans_move_along() -> None:
    passage = unicodedata.normalize("NFD", GOOD["passage"])
    start = passage.index(unicodedata.normalize("NFD", "늦으면"))
    sample = parse_sample({**GOOD, "passage": passage, "spans": [[start, len(passage)]], "section": None})
    assert sample.passage == GOOD["passage"]
    assert sample.passage[slice(*sample.grounding)] == "늦으면 과태료를 냅니다."


def test_dialogue_of_an_id_without_a_turn() -> None:
    assert parse_sample({**GOOD, "id": "질문7"}).dialogue_id == "질문7"
    assert parse_sample({**GOOD, "id": "a_b_12"}).dialogue_id == "a_b"
    assert parse_sample({**GOOD, "dialogue_id": "own"}).dialogue_id == "own"


texts = st.text(st.characters(codec="utf-8"), min_size=1).map(lambda text: unicodedata.normalize("NFC", text))
filled = texts.filter(lambda text: bool(text.strip()))


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    passage = draw(texts)
    cuts = st.tuples(st.integers(0, len(passage) - 1), st.integers(1, len(passage)))
    # Composing a part of a text may differ from a part of the composed text; spans begin and end between characters.
    spans = draw(st.lists(cuts.filter(lambda cut: cut[0] < cut[1] and _composed(passage, *cut)), max_size=3))
    history = draw(st.lists(st.tuples(st.sampled_from(["user", "agent"]), filled), max_size=3))
    question, answer = draw(filled), draw(filled)
    return Sample(
        "s_1", "s", passage, question, answer, tuple(history), tuple(sorted(spans)), (0, len(passage)), language="ko"
    )


def _composed(text: str, start: int, end: int) -> bool:
    return all(len(unicodedata.normalize("NFC", text[:cut])) == cut for cut in (start, end))


@given(samples())
def test_every_sample_survives_json(sample: Sample) -> None:
    assert parse_sample(json.loads(json.dumps(sample.to_json(), ensure_ascii=False))) == sample


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*GOOD, "domain"]), json_values) | json_values)
def test_anything_else_is_a_field_error(entry: Any) -> None:
    whole = {**GOOD, **entry} if isinstance(entry, dict) else entry
    try:
        assert parse_sample(whole).answer.strip()
    except FieldError as error:
        named = error
    else:
        return
    assert named.reason
    assert named.field in ("", *GOOD, "domain")
