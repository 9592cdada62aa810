"""A calibrated conversion of a real model by two checkouts of svdconvert, in turn: CPU and wall seconds, peak memory.

    python -m tests.benchmarks.calibrated MODEL --calib TEXT.txt --against CHECKOUT --samples 8 48

Method kfac, a global budget, the pivoted layout, by the command line. CPU seconds are user and system time of all
threads. With two numbers of sequences, seconds a sequence and those of the rest come out, too: what a conversion takes
is nearly a straight line in the number of tokens. Medians over the rounds. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .harness import new_parser
from .measure import ROOT, machine, machine_line, markdown_table, repeated, run, save

FIGURES = ("cpu_s", "wall_s", "peak_bytes")


def convert(checkout: Path, options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """One conversion by a checkout."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        line = ["svdconvert", str(options.model.resolve()), "--keep", str(options.keep), "--method", "kfac"]
        line += ["--layout", "pivoted", "--calib", str(options.calib.resolve()), "--calib-samples", str(samples)]
        line += ["--calib-length", str(options.length), "--out", str(Path(scratch) / "out")]
        measured = run(line, threads=options.threads, root=checkout).to_json()
        shutil.rmtree(Path(scratch) / "out")
    return measured


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Both checkouts with every number of sequences, in turn within each round."""
    sides = {"this one": ROOT, "the other": options.against.resolve()}
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {(n, side): [] for n in options.samples for side in sides}
    for _ in range(options.repeats):
        for (samples, side), found in runs.items():
            found.append(convert(sides[side], options, samples))
    return {
        "machine": machine(),
        "model": options.model.name,
        "keep": options.keep,
        "length": options.length,
        "threads": options.threads,
        "repeats": options.repeats,
        "runs": [{"samples": samples, "side": side, "rounds": found} for (samples, side), found in runs.items()],
    }


def middle(runs: Sequence[Mapping[str, Any]], samples: int, side: str) -> dict[str, float]:
    """Medians of one row."""
    (rounds,) = (one["rounds"] for one in runs if (one["samples"], one["side"]) == (samples, side))
    return {figure: median(each[figure] for each in rounds) for figure in FIGURES}


def markdown(result: Mapping[str, Any]) -> str:
    """A table: both sides and their ratio, for every number of sequences."""
    counts = list(dict.fromkeys(one["samples"] for one in result["runs"]))
    rows = []
    for samples in counts:
        ours, theirs = (middle(result["runs"], samples, side) for side in ("this one", "the other"))
        cells = [f"{samples * result['length']:,}"]
        for figure in FIGURES:
            digits, unit = ("{:,.0f}", 1e6) if figure == "peak_bytes" else ("{:.1f}", 1)
            cells += [digits.format(theirs[figure] / unit), digits.format(ours[figure] / unit)]
            cells.append(f"{ours[figure] / theirs[figure]:.2f}")
        rows.append(cells)
    heads = ["tokens"]
    for name in ("CPU s", "wall s", "peak MB"):
        heads += [f"{name}, other", "this", "ratio"]
    head = (
        f"{result['model']} at {result['keep']:.0%}, kfac, global, pivoted; sequences of {result['length']} tokens, "
        f"{repeated(result['repeats'])}, in turn."
    )
    lines = [head, "", markdown_table(heads, rows), ""]
    if len(counts) > 1:
        low, high = min(counts), max(counts)
        for side in ("the other", "this one"):
            few, many = (middle(result["runs"], samples, side)["cpu_s"] for samples in (low, high))
            each = (many - few) / (high - low)
            lines.append(f"{side}: {few - each * low:.1f} CPU s, and {each:.2f} for each sequence")
        lines.append("")
    return "\n".join([*lines, machine_line(result["machine"])])


def main() -> None:
    """Command line."""
    parser = new_parser("calibrated", repeats=1, scratch=True)
    parser.add_argument("model", type=Path, help="a dense model's folder")
    parser.add_argument("--calib", type=Path, required=True, help="its text")
    parser.add_argument("--against", type=Path, required=True, help="another checkout of svdconvert")
    parser.add_argument("--samples", type=int, nargs="+", default=[8], help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=0, help="OMP_NUM_THREADS; 0 leaves it as it is")
    options = parser.parse_args()
    result = benchmark(options)
    save(options.out, f"calibrated-{options.model.name}", result, markdown(result))


if __name__ == "__main__":
    main()
