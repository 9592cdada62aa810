"""Methods, allocations and budgets on a trained model: held-out perplexity of each combination.

    python -m tests.benchmarks.quality --out docs/quality
    python -m tests.benchmarks.quality --out docs/quality --update --only "kfac, global" "kfac, global, pivoted"

By default on the bundled model. Every combination starts from one calibration (the decompositions are kept), is written
as a real checkpoint, and is evaluated on text that neither training nor calibration has seen. Writes JSON and Markdown.
With ``--update`` the rows and budgets that are not run stay as the files have them, and so does what the Markdown says
before its table.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdconvert import Calibration, convert, evaluate
from svdconvert.methods.table import METHODS

from .harness import add_bundled, new_parser

# How the line above the table begins.
_TABLE = "Dense perplexity"


@dataclass(frozen=True)
class Row:
    """One way to compress."""

    name: str
    method: str
    allocation: str
    layout: str = "balanced"
    share_layers: int = 1
    refit: str = "none"
    shrinkage: float | None = None
    labels: str = "empirical"
    rank_multiple: int = 1

    @property
    def work(self) -> str:
        """Rows of one such name start from the same decompositions."""
        parts = [self.method, *([] if self.shrinkage is None else [f"{self.shrinkage:g}"]), self.labels]
        return "-".join(["work", *parts, *([str(self.share_layers)] if self.share_layers > 1 else [])])


ROWS = (
    Row("svd, uniform", "svd", "uniform"),
    Row("svd, uniform, pivoted", "svd", "uniform", "pivoted"),
    Row("asvd, uniform", "asvd", "uniform"),
    Row("fwsvd, uniform", "fwsvd", "uniform"),
    Row("whiten, uniform (SVD-LLM)", "whiten", "uniform"),
    Row("whiten, uniform, pivoted", "whiten", "uniform", "pivoted"),
    Row("whiten, global", "whiten", "global"),
    Row("kfac, uniform", "kfac", "uniform"),
    Row("kfac, global", "kfac", "global"),
    Row("kfac, global, pivoted", "kfac", "global", "pivoted"),
    Row("whiten, uniform, refit", "whiten", "uniform", refit="sequential"),
    Row("kfac, global, refit", "kfac", "global", refit="sequential"),
    Row("kfac, global, pivoted, refit", "kfac", "global", "pivoted", refit="sequential"),
    Row("kfac, global, pivoted, sampled labels", "kfac", "global", "pivoted", labels="sampled"),
    Row("kfac, global, pivoted, shrinkage 0", "kfac", "global", "pivoted", shrinkage=0.0),
    *(
        Row(f"{method}, {allocation}, shared by {layers} layers", method, allocation, share_layers=layers)
        for method, allocation in (("svd", "uniform"), ("whiten", "uniform"), ("kfac", "global"))
        for layers in (2, 3)
    ),
    *(Row(f"kfac, global, ranks a multiple of {n}", "kfac", "global", rank_multiple=n) for n in (8, 16)),
)


def main() -> None:
    """Run the comparison."""
    parser = new_parser("quality", out=False)
    add_bundled(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="names of rows; default all")
    parser.add_argument("--update", action="store_true", help="replace these rows in the files that are there")
    parser.add_argument("--work", type=Path, help="keep the decompositions here for another run")
    options = parser.parse_args()

    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        results = compare(options, Path(temporary))
    print(table(write(options, results)))


def write(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Write the results so far as JSON and Markdown; with ``--update`` together with what is there."""
    numbers, page = options.out.with_suffix(".json"), options.out.with_suffix(".md")
    preface = ""
    if options.update:
        results = merged(json.loads(numbers.read_text()), results) if numbers.exists() else results
        preface = page.read_text().partition(_TABLE)[0] if page.exists() else ""
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    page.write_text(preface + table(results))
    return results


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows at all budgets."""
    calibration = Calibration(options.calib, samples=options.samples, length=options.length, batch_size=16)

    def perplexity(path: Path) -> float:
        return evaluate(path, options.text, window=options.window, batch_size=32, device="cpu").perplexity

    dense = perplexity(options.model)
    results: dict[str, Any] = {
        "model": options.model.name,
        "dense_perplexity": dense,
        "calibration": {"samples": options.samples, "length": options.length},
        "window": options.window,
        "rows": [],
    }
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        for keep in options.keep:
            out = folder / "out"
            report = convert(
                options.model,
                out,
                keep=keep,
                method=row.method,
                allocation=row.allocation,
                layout=row.layout,
                share_layers=row.share_layers,
                rank_multiple=row.rank_multiple,
                refit=row.refit,
                shrinkage=row.shrinkage,
                calibration=replace(calibration, labels=row.labels) if METHODS[row.method].statistics else None,
                work=(options.work or folder) / row.work,
                device="cpu",
                check=False,
            )
            found = perplexity(out)
            results["rows"].append(
                {
                    "name": row.name,
                    "keep": keep,
                    "params": report.plan.params_after,
                    "perplexity": found,
                    "added": math.log(found / dense),
                    "predicted": report.outcome.record.get("predicted_loss"),
                }
            )
            print(row.name, keep, f"{found:.2f}", f"+{math.log(found / dense):.4f}", flush=True)
            write(options, results)
            shutil.rmtree(out)
    return results


def merged(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Results with those of a later run in the place of the same rows and budgets, in the order of :data:`ROWS`.

    Raises:
        ValueError: they are of another model or setting.
    """
    for name in ("model", "dense_perplexity", "calibration", "window"):
        if not _same(before[name], after[name]):
            raise ValueError(f"another {name}: {before[name]}, now {after[name]}")
    order = [row.name for row in ROWS]
    rows = {(row["name"], row["keep"]): row for results in (before, after) for row in results["rows"]}
    # What has no row any more is left out.
    kept = [row for row in rows.values() if row["name"] in order]
    return {**after, "rows": sorted(kept, key=lambda row: (order.index(row["name"]), -row["keep"]))}


def _same(one: Any, other: Any) -> bool:
    """Equal, numbers but for what threads and versions do to the last digits."""
    return math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else bool(one == other)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    keeps = list(dict.fromkeys(row["keep"] for row in results["rows"]))
    lines = [
        f"{_TABLE} {results['dense_perplexity']:.2f} (window {results['window']}); in each cell perplexity and "
        "added log-perplexity.",
        "",
        "| | " + " | ".join(f"{keep:.0%} kept" for keep in keeps) + " |",
        "|---" * (len(keeps) + 1) + "|",
    ]
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        cells = {row["keep"]: row for row in results["rows"] if row["name"] == name}
        told = {keep: f"{cell['perplexity']:.2f} (+{cell['added']:.3f})" for keep, cell in cells.items()}
        lines.append(f"| {name} | " + " | ".join(told.get(keep, "not run") for keep in keeps) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
