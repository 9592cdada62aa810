"""The file of all measurements, docs/real.json, and the tables made of it in docs/real.md.

    python -m tests.benchmarks.real.book      # the tables again, from the file

A table stands between two comments of the page; what is around them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import machine, machine_line, markdown_table

from . import text_tables
from .rows import KEEPS
from .subjects import SUBJECTS, Subject

OUT = Path("docs/real")
Line = Mapping[str, Any]
# What the figures were measured on where a line does not say it: WikiText-2's texts, by their SHA-256.
UNSAID = {
    "version": "0.2.0",
    "validation_sha256": "fad4e864edb80cad960afa6d709a3aef79466ed3b14cd39588ec0e677f874835",
    "test_sha256": "de76f21c9c9ffd6daaa88626bf8685824cc7427b401d5d2af3958a060d161a38",
}
# How a question was answered -> whether the dense and whether the factored model was right.
ANSWERS = {"both": (1, 1), "dense_alone": (1, 0), "factored_alone": (0, 1), "neither": (0, 0)}


def read(out: Path) -> dict[str, Any]:
    """What has been measured so far."""
    numbers = out.with_suffix(".json")
    found: dict[str, Any] = json.loads(numbers.read_text()) if numbers.is_file() else {}
    return {"machine": machine(), "subjects": {}, "losses": [], "tasks": [], "texts": []} | found


def there(lines: Sequence[Line], subject: str, name: str, keep: float, calibration_tokens: int, on: Line) -> bool:
    """Whether a row was measured, and on the same: tokens of the test text, texts and version."""
    known = line(lines, subject, name, keep, calibration_tokens)
    return known is not None and all(known.get(field, UNSAID.get(field)) == on[field] for field in on)


def line(lines: Sequence[Line], subject: str, name: str, keep: float, calibration_tokens: int) -> Line | None:
    """The line of one row at one budget, or None; plain SVD needs no text."""
    key, names = (subject, name, keep), ("subject", "name", "keep")
    alike = [known for known in lines if tuple(known[field] for field in names) == key]
    return next((known for known in alike if known["calibration_tokens"] in (0, calibration_tokens)), None)


def add(out: Path, subject: Subject, found: Line) -> None:
    """Put a line in the place of the same one, or at the end."""
    whole = read(out)
    whole["machine"] = machine()
    whole["subjects"][subject.name] = {
        "packages": list(subject.packages), "file": subject.file, "sha256": subject.sha256,
    }  # fmt: skip
    known = line(whole["losses"], found["subject"], found["name"], found["keep"], found["calibration_tokens"])
    whole["losses"] = [each for each in whole["losses"] if each is not known] + [found]
    write(out, whole)


def same(lines: Sequence[Line], key: Line) -> Line | None:
    """The line with these fields, or None."""
    return next((known for known in lines if all(known[field] == key[field] for field in key)), None)


def put(out: Path, kind: str, key: Line, found: Line) -> None:
    """Put a line in the place of the one with the same key, or at the end of the lines of its kind."""
    whole = read(out)
    known = same(whole[kind], key)
    whole[kind] = [each for each in whole[kind] if each is not known] + [found]
    write(out, whole)


def write(out: Path, whole: Mapping[str, Any]) -> None:
    """The file, and the page's tables where there is a page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    page = out.with_suffix(".md")
    if page.is_file():
        page.write_text(rendered(page.read_text(), whole))


def rendered(page: str, whole: Mapping[str, Any]) -> str:
    """The page with today's tables."""
    for name, table in TABLES.items():
        if whole.get({"sources": "subjects", "amounts": "texts"}.get(name, name)):
            page = placed(page, name, table(whole))
    return page


def placed(page: str, name: str, table: str) -> str:
    """The page with a table in its place, if it has one."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in page:
        return page
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"


def sources(whole: Mapping[str, Any]) -> str:
    """Where the models come from, and the machine."""
    lines = [
        f"* {SUBJECTS[name].title}: {', '.join(told['packages'])}; {told['file']}, SHA-256 {told['sha256']}"
        for name, told in whole["subjects"].items()
    ]
    return "\n".join([*lines, f"* {machine_line(whole['machine'])}"])


def losses(whole: Mapping[str, Any]) -> str:
    """Added log-perplexity, KL and agreement."""
    heads = ("row", "kept", "text", "parameters", "perplexity", "added", "of SVD-LLM's", "KL", "same choice", "CPU s")
    blocks = []
    for name in whole["subjects"]:
        lines = [line for line in whole["losses"] if line["subject"] == name and line["keep"] in KEEPS]
        dense = lines[0]
        known = ", ".join(f"{field} {dense[field.replace('-', '_')]:.4f}" for field in ("cross-entropy", "entropy"))
        head = (
            f"{SUBJECTS[name].title}: {dense['params_before']:,} parameters; on {dense['tokens']:,} tokens "
            f"perplexity {_perplexity(dense):.2f}, {known} nats."
        )
        blocks += [head, markdown_table(heads, [_cells(found, lines) for found in sorted(lines, key=_order)])]
    return "\n\n".join(blocks)


def _order(found: Line) -> tuple[float, float]:
    return -found["keep"], -found["added"]


def _cells(found: Line, lines: Sequence[Line]) -> tuple[str, ...]:
    peer = line(lines, found["subject"], "whiten, uniform (SVD-LLM)", found["keep"], found["calibration_tokens"])
    share = "" if peer is None else f"{found['added'] / peer['added']:.2f}"
    perplexity = _perplexity(found, found["added"])
    return (
        found["name"], f"{found['keep']:.0%}", f"{found['calibration_tokens'] // 1024}k", f"{found['params']:,}",
        f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.1e}", f"{found['added']:+.3f}", share,
        f"{found['kl']:.3f}", f"{found['agreement']:.1%}", f"{found['cpu_s']:.0f}",
    )  # fmt: skip


def _perplexity(found: Line, added: float = 0.0) -> float:
    return math.exp(found["cross_entropy"] + added)


def tasks(whole: Mapping[str, Any]) -> str:
    """Accuracies, and what is left of them above chance."""
    heads = (
        "subject", "row", "calibrated on", "questions of", "number", "chance", "dense", "factored", "dense alone",
        "factored alone",
    )  # fmt: skip
    rows, left = [], []
    for one in dict.fromkeys(map(group, whole["tasks"])):
        lines = [line for line in whole["tasks"] if group(line) == one]
        total = {answer: sum(line[answer] for line in lines) for answer in ANSWERS}
        total["chance"] = sum(line["chance"] * asked(line) for line in lines) / asked(total)
        text, tokens = lines[0].get("text") or "WikiText-2", f"{lines[0]['calibration_tokens'] // 1024}k"
        made = (title(lines[0]), lines[0]["row"], f"{text}, {tokens}")
        rows += [_answered(made, line["task"], line) for line in lines]
        rows.append(_answered(made, "all", total))
        share, error = above_chance(lines)
        left.append(
            f"* {title(lines[0])} keeps {share:.0%} ± {error:.0%} of its accuracy above chance ({lines[0]['row']}, "
            f'{lines[0]["keep"]:.0%} kept, {tokens} tokens of "{text}", {lines[0]["dtype"]}, '
            f"scored in {lines[0].get('scored', 'bfloat16')})."
        )
    return "\n\n".join([markdown_table(heads, rows), "\n".join(left)])


def group(line: Line) -> tuple[object, ...]:
    """What lines of all tasks have in common: the model, and how it was made."""
    return (*(line[key] for key in ("subject", "row", "keep", "calibration_tokens")), line.get("text", ""))


def asked(line: Line) -> int:
    """Questions of a line."""
    return sum(line[answer] for answer in ANSWERS)


def above_chance(lines: Sequence[Line]) -> tuple[float, float]:
    """What is left of the dense model's accuracy above chance, over all questions, and its standard error.

    The share s is a ratio of two means over the same questions; its error is that of the mean of
    (factored - chance) - s (dense - chance), divided by the mean of (dense - chance): the delta method.
    """
    kinds = [
        (line[answer], dense - line["chance"], factored - line["chance"])
        for line in lines
        for answer, (dense, factored) in ANSWERS.items()
    ]
    count = sum(number for number, _, _ in kinds)
    dense = sum(number * dense for number, dense, _ in kinds) / count
    share = sum(number * factored for number, _, factored in kinds) / count / dense
    variance = sum(number * (factored - share * dense) ** 2 for number, dense, factored in kinds) / count
    return share, math.sqrt(variance / count) / dense


def _answered(made: Sequence[str], task: str, line: Line) -> tuple[str, ...]:
    number = asked(line)
    sides = (line["both"] + line["dense_alone"], line["both"] + line["factored_alone"])
    return (
        *made, task, f"{number}", f"{line['chance']:.1%}", *(f"{side / number:.1%}" for side in sides),
        f"{line['dense_alone']}", f"{line['factored_alone']}",
    )  # fmt: skip


def title(found: Line) -> str:
    """Name of a line's model, for tables."""
    name: str = found["subject"]
    return SUBJECTS[name].title if name in SUBJECTS else name


# Name of a place in the page -> what belongs there. A part that is not measured leaves its place as it is.
TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "sources": sources,
    "losses": losses,
    "tasks": tasks,
    "texts": text_tables.texts,
    "amounts": text_tables.amounts,
}


def main() -> None:
    """Make the tables again."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.book")
    parser.add_argument("--out", type=Path, default=OUT, help="file name without its ending")
    out = parser.parse_args().out
    write(out, read(out))


if __name__ == "__main__":
    main()
