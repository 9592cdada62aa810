"""The blind sheet: who answered is in the key alone, and the tally gives every judgement back to its setting."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from examples.dialogue.schema import Sample
from examples.dialogue.sheet import ABNORMAL, JUDGEMENTS, make_sheet, tally
from svdconvert.errors import InputError

SETTINGS = ("3.8B", "1.3B", "1.3B-S")
TABLE2 = Path(__file__).parents[2] / "examples" / "dialogue" / "table2"


def some(count: int = 40) -> list[Sample]:
    return [
        Sample(f"d{n}_1", f"d{n}", f"문서 {n}", f"질문 {n}?", f"정답 {n}", (("user", "안녕"),)) for n in range(count)
    ]


def answers(samples: list[Sample]) -> dict[str, dict[str, str]]:
    return {setting: {sample.id: f"{setting}의 답 {sample.id}" for sample in samples} for setting in SETTINGS}


def rows_of(sheet: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(sheet, newline="")))


def filled(sheet: str, judgements: dict[str, str]) -> str:
    """The sheet with a judgement by the setting that its answers name."""
    rows = rows_of(sheet)
    for row in rows:
        for letter in "ABC":
            row[f"판단 {letter}"] = judgements[row[f"답변 {letter}"].split("의")[0]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def judged(sheet: str) -> str:
    return filled(sheet, {"3.8B": "좋음", "1.3B": "나쁨", "1.3B-S": "판단불가"})


def test_the_tally_undoes_the_order() -> None:
    samples = some()
    sheet, key = make_sheet(samples, answers(samples))
    counts = tally(judged(sheet), key)
    assert counts["3.8B"] == {"좋음": 30, "나쁨": 0, "판단불가": 0}
    assert counts["1.3B"] == {"좋음": 0, "나쁨": 30, "판단불가": 0}
    assert counts["1.3B-S"] == {"좋음": 0, "나쁨": 0, "판단불가": 30}
    assert all(sum(counts[setting].values()) == 30 for setting in SETTINGS)


def test_the_sheet_is_seeded_blind_and_mixed() -> None:
    samples = some()
    sheet, key = make_sheet(samples, answers(samples), seed=5)
    assert make_sheet(list(reversed(samples)), answers(samples), seed=5) == (sheet, key)
    assert make_sheet(samples, answers(samples), seed=6)[0] != sheet
    rows = rows_of(sheet)
    assert len(rows) == len({row["질문"] for row in rows}) == 30
    assert not any(setting in name for setting in SETTINGS for name in rows[0])
    # Every setting stands under every letter somewhere.
    assert {(letter, row[letter]) for row in key["rows"] for letter in "ABC"} == {
        (a, b) for a in "ABC" for b in SETTINGS
    }
    # Other settings, the same samples.
    assert [row["id"] for row in make_sheet(samples, {"x": answers(samples)["1.3B"]}, seed=5)[1]["rows"]] == [
        row["id"] for row in key["rows"]
    ]


def test_only_samples_that_all_settings_answered() -> None:
    samples = some(35)
    given = answers(samples)
    for sample in samples[:5]:
        del given["1.3B"][sample.id]
    chosen = make_sheet(samples, given)[1]["rows"]
    assert {row["id"] for row in chosen} == {sample.id for sample in samples[5:]}
    del given["3.8B"]["d20_1"]
    with pytest.raises(InputError, match="29 samples have an answer of every setting, but 30 are asked for"):
        make_sheet(samples, given)
    with pytest.raises(InputError, match="1 to 26 settings"):
        make_sheet(samples, {})


def test_table_2_of_the_paper_as_a_sheet() -> None:
    from examples.dialogue.schema import read_jsonl

    samples, _ = read_jsonl(TABLE2 / "sample.jsonl")
    table = json.loads((TABLE2 / "answers.json").read_text(encoding="utf-8"))["answers"]
    sheet, key = make_sheet(samples, {row["setting"]: {"table2_1": row["answer"]} for row in table}, rows=1)
    by_setting = {row["setting"]: row["judgement"] for row in table}
    rows = rows_of(sheet)
    rows[0][ABNORMAL] = "x"
    for letter in "ABCDEF":
        rows[0][f"판단 {letter}"] = by_setting[key["rows"][0][letter]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    counts = tally(text.getvalue(), key)
    assert {setting: max(counts[setting], key=counts[setting].get) for setting in by_setting} == by_setting
    assert counts[ABNORMAL] == {"rows": 1}


def test_cells_are_text_and_long_passages_are_shown_around_the_grounding() -> None:
    passage = "가" * 5000 + "근거" + "나" * 5000
    samples = [Sample("d_1", "d", passage, "=1+1", "-없음", spans=((5000, 5002),))]
    sheet, _ = make_sheet(samples, {"a": {"d_1": "@답\n둘째 줄, 쉼표"}}, rows=1)
    (row,) = rows_of(sheet)
    assert (row["질문"], row["정답"], row["답변 A"]) == ("'=1+1", "'-없음", "'@답\n둘째 줄, 쉼표")
    assert "근거" in row["문서"]
    assert len(row["문서"]) == 2002
    assert row["대화 기록"] == "없음"


def test_judgements_must_be_there_and_known() -> None:
    samples = some(3)
    sheet, key = make_sheet(samples, answers(samples), rows=3)
    with pytest.raises(InputError, match="row 1, 판단 A, is empty; write 좋음, 나쁨, 판단불가"):
        tally(sheet, key)
    whole = judged(sheet)
    assert tally(whole.replace("판단불가", " 판단 불가"), key) == tally(whole, key)
    with pytest.raises(InputError, match=r"row \d, 판단 [ABC], says '보통'"):
        tally(whole.replace("좋음", "보통"), key)
    with pytest.raises(InputError, match="no column '판단 B'"):
        tally(whole.replace("판단 B", "B"), key)
    with pytest.raises(InputError, match="2 rows, the key 3"):
        tally("\r\n".join(whole.split("\r\n")[:-2]), key)
    with pytest.raises(InputError, match="not those of the key"):
        tally(judged(make_sheet(samples, answers(samples), rows=3, seed=1)[0]), key)
    # A spreadsheet may sort the rows.
    lines = whole.split("\r\n")
    assert tally("\r\n".join([lines[0], *reversed(lines[1:-1])]), key) == tally(whole, key)


def test_the_papers_three_judgements() -> None:
    assert list(JUDGEMENTS) == ["좋음", "나쁨", "판단불가"]
