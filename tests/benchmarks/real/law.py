"""Measured over predicted loss, of every model that has been measured: the table of docs/prediction.md.

    python -m tests.benchmarks.real.law

Runs no model: it reads docs/real.json, docs/quality.json and docs/quality_llama.json. Measured is the log-perplexity
that held-out text loses, predicted what the conversion says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import ROOT, markdown_table

from . import book
from .rows import KEEPS, LAW, LAW_KEEPS

PAGE = Path("docs/prediction.md")
SMALL = {"LLaMA, 1M": "docs/quality_llama.json", "bundled GPT-NeoX, 4M": "docs/quality.json"}
NAMES = ("kfac, uniform", "kfac, global", LAW.name)
BUDGETS = sorted({*KEEPS, *LAW_KEEPS, 0.4}, reverse=True)


def table(root: Path = ROOT) -> str:
    """Markdown: a line for every model and row, a column for every budget."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for title, line in _lines(root):
        if line["name"] in NAMES and line["predicted"]:
            found.setdefault((title, line["name"]), {})[line["keep"]] = line["added"] / line["predicted"]
    rows = [
        (f"{title}: {name}", *(f"{ratios[keep]:.2f}" if keep in ratios else "" for keep in BUDGETS))
        for (title, name), ratios in found.items()
    ]
    return markdown_table(("measured / predicted", *(f"{keep:.0%} kept" for keep in BUDGETS)), rows)


def _lines(root: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for line in json.loads((root / "docs/real.json").read_text())["losses"]:
        yield f"{book.title(line)}, {line['calibration_tokens'] // 1024}k tokens", line
    for title, file in SMALL.items():
        for line in json.loads((root / file).read_text())["rows"]:
            yield title, line


def main() -> None:
    """Put the table into the page."""
    page = ROOT / PAGE
    page.write_text(book.placed(page.read_text(), "law", table()))


if __name__ == "__main__":
    main()
