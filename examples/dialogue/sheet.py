"""The qualitative evaluation: a blind sheet to judge by hand, and its tally.

    python -m examples.dialogue.sheet make 1.3B=a.jsonl 1.3B-S=b.jsonl --data validation.jsonl --out sheet.csv
    python -m examples.dialogue.sheet tally sheet.csv

A row of the sheet is a sample with the answers of all settings, in an order of its own. What stands where is in the key
file next to the sheet. The judgements are those of Lee et al. (2023), section 4.4.2.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from examples.dialogue.commands import SETTINGS, Group
from examples.dialogue.predictions import read_predictions
from examples.dialogue.schema import Sample, nfc, read_jsonl, write_whole
from svdconvert.errors import InputError

JUDGEMENTS = {
    "좋음": "문법에 맞는 문장이고, 정답과 같은 말이거나 정답이 아니더라도 질문에 적절하여 도움이 된다",
    "나쁨": "문법에 맞는 문장이지만, 정답이 아니고 도움도 되지 않는다",
    "판단불가": "문법에 맞는 문장이 아니고, 정답 여부를 판별할 수 없다",
}
ROWS = 30
NUMBER, ABNORMAL = "번호", "정답 비정상"
_SAMPLE_COLUMNS = (NUMBER, "문서", "대화 기록", "질문", "정답", ABNORMAL)
_ROLES = {"user": "사용자", "agent": "에이전트"}


def make_sheet(
    samples: Sequence[Sample],
    answers: Mapping[str, Mapping[str, str]],
    *,
    rows: int = ROWS,
    seed: int = 0,
    passage_characters: int = 2000,
) -> tuple[str, dict[str, Any]]:
    """The sheet as CSV, and its key.

    Args:
        samples: to choose from; those that every setting has an answer to.
        answers: by setting and by the id of their sample; at most 26 settings.
        rows: samples to choose.
        seed: chooses them and the order of the answers in each row.
        passage_characters: longest passage to show; the middle of a longer one, around the grounding, is shown.

    Raises:
        InputError: too few samples have all answers, or there are too many settings.
    """
    if not 1 <= len(answers) <= len(string.ascii_uppercase):
        raise InputError(f"a sheet compares 1 to 26 settings, not {len(answers)}")
    common = [sample for sample in samples if all(sample.id in given for given in answers.values())]
    if rows < 1 or len(common) < rows:
        raise InputError(f"{len(common):,} samples have an answer of every setting, but {rows:,} are asked for")
    # The choice depends on the samples alone, not on their order or on the settings.
    generator = random.Random(seed)
    chosen = generator.sample(sorted(common, key=lambda sample: sample.id), rows)
    letters = string.ascii_uppercase[: len(answers)]
    header = [*_SAMPLE_COLUMNS, *(name for letter in letters for name in (f"답변 {letter}", f"판단 {letter}"))]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    key: dict[str, Any] = {"seed": seed, "settings": list(answers), "rows": []}
    for number, sample in enumerate(chosen, 1):
        order = generator.sample(list(answers), len(answers))
        cells = [_shown(sample, passage_characters), _dialogue(sample), sample.question, sample.answer, ""]
        for setting in order:
            cells += [answers[setting][sample.id], ""]
        writer.writerow([number, *map(_cell, cells)])
        key["rows"].append({"number": number, "id": sample.id, **dict(zip(letters, order, strict=True))})
    key["questions"] = _digest([_cell(sample.question) for sample in chosen])
    return text.getvalue(), key


def tally(sheet: str, key: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Count the judgements of a filled-in sheet.

    Args:
        sheet: its text.
        key: that was made with it.

    Returns:
        Counts by setting and judgement, which add up to the rows of the sheet, and how many references were marked as
        abnormal under ``정답 비정상``.

    Raises:
        InputError: rows or columns are missing, the sheet is not the key's, or a judgement is missing or unknown.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(sheet, newline="")))
    except csv.Error as error:
        raise InputError(f"the sheet is no readable CSV ({error}); save it from the spreadsheet as CSV UTF-8") from None
    letters = string.ascii_uppercase[: len(key["settings"])]
    columns = [NUMBER, "질문", *(f"판단 {letter}" for letter in letters)]
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise InputError(f"the sheet has no column {missing[0]!r}; fill in the CSV file that `make` wrote, commas kept")
    by_number = {(row[NUMBER] or "").strip(): row for row in rows}
    numbers = [str(entry["number"]) for entry in key["rows"]]
    if len(rows) != len(numbers) or set(by_number) != set(numbers):
        raise InputError(f"the sheet has {len(rows)} rows, the key {len(numbers)}, or their numbers differ")
    if _digest([by_number[number]["질문"] or "" for number in numbers]) != key["questions"]:
        raise InputError("the questions of the sheet are not those of the key; give the key that was made with it")
    counts = {setting: dict.fromkeys(JUDGEMENTS, 0) for setting in key["settings"]}
    for entry in key["rows"]:
        row = by_number[str(entry["number"])]
        for letter in letters:
            judgement = nfc((row[f"판단 {letter}"] or "").replace(" ", "").strip())
            if judgement not in JUDGEMENTS:
                what = f"says {judgement!r}" if judgement else "is empty"
                raise InputError(f"row {entry['number']}, 판단 {letter}, {what}; write {', '.join(JUDGEMENTS)}")
            counts[entry[letter]][judgement] += 1
    abnormal = sum(bool((row.get(ABNORMAL) or "").strip()) for row in rows)
    return {**counts, ABNORMAL: {"rows": abnormal}}


def _shown(sample: Sample, characters: int) -> str:
    """The passage, or as much of it around the grounding as there is room for."""
    if len(sample.passage) <= characters:
        return sample.passage.strip() or "없음"
    start, end = sample.grounding or (0, characters)
    begin = max(0, min((start + end - characters) // 2, len(sample.passage) - characters))
    return f"…{sample.passage[begin : begin + characters].strip()}…"


def _dialogue(sample: Sample) -> str:
    return "\n".join(f"{_ROLES[role]}: {text}" for role, text in sample.history) or "없음"


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") else text


def _digest(questions: Sequence[str]) -> str:
    # A spreadsheet may change the line ends inside cells.
    lines = json.dumps([" ".join(nfc(question).split()) for question in questions], ensure_ascii=False)
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def _key_path(sheet: Path, key: Path | None) -> Path:
    return key or sheet.with_suffix(".key.json")


_PATH = click.Path(path_type=Path)


@click.group(cls=Group, context_settings=SETTINGS)
def main() -> None:
    """A blind sheet to judge answers by hand, and its tally."""


@main.command()
@click.argument("predictions", nargs=-1, required=True, metavar="SETTING=FILE...")
@click.option("--data", type=_PATH, required=True, help="Samples that the predictions answer.")
@click.option("--out", type=_PATH, required=True, help="Sheet to write (.csv).")
@click.option("--key", type=_PATH, help="Key to write.  [the sheet's name with .key.json]")
@click.option("--rows", type=click.IntRange(1), default=ROWS, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def make(predictions: tuple[str, ...], data: Path, out: Path, key: Path | None, rows: int, seed: int) -> None:
    """Write a sheet: ROWS samples, each with the answers of all settings in an order of its own.

    It opens in Excel as it is. Fill in the columns 판단 and save as CSV UTF-8.
    """
    given: dict[str, Mapping[str, str]] = {}
    for word in predictions:
        setting, equals, path = word.partition("=")
        if not equals or not setting or not path or setting in given:
            raise InputError(f"{word!r} is not SETTING=FILE with a setting of its own, as in 1.3B-S=answers.jsonl")
        given[setting] = read_predictions(path)[1]
    for target in (out, _key_path(out, key)):
        if target.exists():
            raise InputError(f"{target} exists, perhaps with judgements in it; give another --out or remove it")
    samples, _ = read_jsonl(data)
    sheet, made = make_sheet(samples, given, rows=rows, seed=seed)
    write_whole(_key_path(out, key), (json.dumps(made, indent=2, ensure_ascii=False) + "\n").encode())
    write_whole(out, sheet.encode("utf-8-sig"))
    click.echo(f"{out}: {rows} rows, {len(given)} answers each; the key is in {_key_path(out, key)}, judge without it")
    for name, meaning in JUDGEMENTS.items():
        click.echo(f"  {name}: {meaning}")


@main.command("tally")
@click.argument("sheet", type=_PATH)
@click.option("--key", type=_PATH, help="Key of the sheet.  [the sheet's name with .key.json]")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON on standard output.")
def tally_command(sheet: Path, key: Path | None, as_json: bool) -> None:
    """Count the judgements of a filled-in SHEET, by setting."""
    key = _key_path(sheet, key)
    try:
        text = sheet.read_bytes().decode("utf-8-sig")
        made = json.loads(key.read_text(encoding="utf-8"))
        known = [made["settings"], made["rows"], made["questions"]]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{sheet} is not UTF-8; save it from the spreadsheet as CSV UTF-8") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{key} is no key of a sheet; give the file that `make` wrote") from None
    counts = tally(text, made)
    if as_json:
        click.echo(json.dumps(counts, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *JUDGEMENTS)
    for setting in known[0]:
        table.add_row(setting, *(str(counts[setting][name]) for name in JUDGEMENTS))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(f"{ABNORMAL}: {counts[ABNORMAL]['rows']} of {len(known[1])} rows", highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.sheet")
