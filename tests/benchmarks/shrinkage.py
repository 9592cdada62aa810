"""Shrinkage of the metrics against the length of the calibration text: held-out perplexity of each combination.

    python -m tests.benchmarks.shrinkage --out docs/shrinkage

By default on the bundled model. For each number of sequences the statistics are collected once; every combination is
written as a real checkpoint and evaluated on text that neither training nor calibration has seen. Writes JSON and
Markdown.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from svdconvert import Calibration, calibrate, convert, evaluate

from .harness import add_bundled, new_parser, save_at


def main() -> None:
    """Run the comparison."""
    parser = new_parser("shrinkage", out=False)
    add_bundled(parser)
    parser.add_argument("--characters", type=int, help="of the held-out text; default all")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 64, 256], help="sequences to calibrate on")
    parser.add_argument("--length", type=int, default=256, help="tokens in each")
    parser.add_argument("--methods", nargs="+", default=["whiten", "kfac"], help="each with its own allocation")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--seed", type=int, default=0, help="chooses the sequences")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stride", type=int, default=255)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = compare(options, Path(temporary))
    save_at(options.out, results, table(results))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All combinations."""

    held_out = folder / "text.txt"
    held_out.write_text(options.text.read_text(encoding="utf-8")[: options.characters], encoding="utf-8")

    def perplexity(path: Path) -> float:
        measured = evaluate(path, held_out, window=options.window, stride=options.stride, batch_size=32, device="cpu")
        return measured.perplexity

    dense = perplexity(options.model)
    rows = []
    for samples in options.samples:
        stats, out = folder / f"stats-{samples}", folder / "out"
        text = Calibration(options.calib, samples=samples, length=options.length, seed=options.seed, batch_size=16)
        calibrate(options.model, text, stats, methods=options.methods, device="cpu")
        for method in options.methods:
            for shrinkage in options.shrinkage:
                work = folder / "work"
                for keep in options.keep:
                    convert(
                        options.model,
                        out,
                        keep=keep,
                        method=method,
                        shrinkage=shrinkage,
                        stats=stats,
                        work=work,
                        device="cpu",
                        check=False,
                    )
                    added = math.log(perplexity(out) / dense)
                    rows.append(
                        {
                            "method": method,
                            "tokens": samples * options.length,
                            "keep": keep,
                            "shrinkage": shrinkage,
                            "added": added,
                        }
                    )
                    print(method, samples * options.length, keep, shrinkage, f"+{added:.4f}", flush=True)
                    shutil.rmtree(out)
                shutil.rmtree(work)
    return {
        "model": options.model.name,
        "dense_perplexity": dense,
        "window": options.window,
        "stride": options.stride,
        "seed": options.seed,
        "characters": options.characters,
        "rows": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown; the best shrinkage of each row is bold."""
    amounts = list(dict.fromkeys(row["shrinkage"] for row in results["rows"]))
    lines = [
        f"Dense perplexity {results['dense_perplexity']:.2f} (window {results['window']}); in each cell the added "
        "log-perplexity.",
        "",
        "| method, kept, calibration tokens | " + " | ".join(f"{amount:g}" for amount in amounts) + " |",
        "|---" * (len(amounts) + 1) + "|",
    ]
    found: dict[tuple[str, float, int], dict[float, float]] = {}
    for row in results["rows"]:
        found.setdefault((row["method"], row["keep"], row["tokens"]), {})[row["shrinkage"]] = row["added"]
    for (method, keep, tokens), cells in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])):
        best = min(cells.values())
        told = [f"**{cells[a]:+.4f}**" if cells[a] == best else f"{cells[a]:+.4f}" for a in amounts]
        lines.append(f"| {method}, {keep:.0%}, {tokens:,} | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
