"""The tables of docs/real.md on texts: what to calibrate with, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.benchmarks.measure import markdown_table

from .corpora import CORPORA
from .rows import KEEPS, LAW
from .subjects import SUBJECTS

Line = Mapping[str, Any]

_BUNDLED = {"tiny-polyglot": "Bundled GPT-NeoX, 4M"}


def texts(whole: Mapping[str, Any]) -> str:
    """A table for every subject: a line for every text and budget, a column for every test text."""
    blocks = []
    for subject in dict.fromkeys(line["subject"] for line in whole["texts"]):
        lines = [line for line in whole["texts"] if line["subject"] == subject]
        # Of some texts there are more tokens too; those are for the other table.
        tokens = lines[0]["calibration_tokens"]
        lines = [line for line in lines if line["calibration_tokens"] == tokens]
        tests = lines[0]["tests"]
        known = ", ".join(
            f"{CORPORA[name].title} {math.exp(test['cross_entropy']):.2f} on {test['tokens']:,} tokens"
            for name, test in tests.items()
        )
        head = f"{_title(subject)}, calibrated on {tokens:,} tokens of each text. Its perplexities: {known}."
        heads = ("calibrated on", "kept", *(CORPORA[name].title for name in tests), "mean KL")
        rows = [row for keep in _budgets(lines) for row in _rows([line for line in lines if line["keep"] == keep])]
        blocks += [head, markdown_table(heads, rows)]
    return "\n\n".join(blocks)


def _rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """Of one budget; the least KL of every column is bold."""
    means = [sum(test["kl"] for test in line["tests"].values()) / len(line["tests"]) for line in lines]
    least = {name: min(line["tests"][name]["kl"] for line in lines) for name in lines[0]["tests"]}
    for line, mean in zip(lines, means, strict=True):
        cells = (
            f"{_bold(test['kl'], least[name])} ({test['added']:+.4f})" for name, test in line["tests"].items()
        )  # fmt: skip
        yield (line["text"], f"{line['keep']:.0%}", *cells, _bold(mean, min(means)))


def _bold(value: float, least: float) -> str:
    return f"**{value:.4f}**" if value == least else f"{value:.4f}"


def amounts(whole: Mapping[str, Any]) -> str:
    """A line for every number of tokens of one text, tested on the same kind of text."""
    found: dict[tuple[str, str], dict[int, dict[float, Line]]] = {}
    for line in whole["losses"]:
        if line["name"] == LAW.name and line["keep"] in KEEPS:
            by_tokens = found.setdefault((line["subject"], CORPORA["wikitext"].title), {})
            by_tokens.setdefault(line["calibration_tokens"], {})[line["keep"]] = line
    for line in whole["texts"]:
        if len(line["sources"]) == 1:
            (source,) = line["sources"]
            by_tokens = found.setdefault((line["subject"], f"{CORPORA[source].title}, windows of 512"), {})
            by_tokens.setdefault(line["calibration_tokens"], {})[line["keep"]] = line["tests"][source]
    rows = []
    for (subject, text), by_tokens in found.items():
        if len(by_tokens) > 1:
            rows += [
                (_title(subject), text, f"{tokens // 1024}k", *_measures(by_tokens[tokens]))
                for tokens in sorted(by_tokens)
            ]
    heads = ("model", "text", "tokens", *(f"KL (added) at {keep:.0%}" for keep in KEEPS))
    return markdown_table(heads, rows)


def _measures(by_budget: Mapping[float, Line]) -> list[str]:
    cells = (by_budget.get(keep) for keep in KEEPS)
    return ["" if line is None else f"{line['kl']:.4f} ({line['added']:+.4f})" for line in cells]


def _budgets(lines: Sequence[Line]) -> list[float]:
    return sorted({line["keep"] for line in lines}, reverse=True)


def _title(subject: str) -> str:
    return _BUNDLED.get(subject) or SUBJECTS[subject].title
