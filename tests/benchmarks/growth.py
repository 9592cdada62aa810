"""Growth of a conversion: time and peak memory against the layers, the hidden size and the rank.

    python -m tests.benchmarks.growth
    python -m tests.benchmarks.growth --layers 2 4 8 --hidden 256 512 --rank 64 128 --repeats 3

One of the three is varied at a time, the others stay at their first value; every conversion is a process of its own,
without the self-check (which loads a small result whole), and the settings take turns within each round. Medians over
the rounds. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .conversion import convert
from .geometry import MODELS, resized
from .harness import new_parser, page, write_checkpoint
from .measure import machine, markdown_table, repeated, save

AXES = {"layers": "layers", "hidden": "hidden size", "rank": "rank"}
_VOCAB = 4096


def settings(axes: dict[str, Sequence[int]]) -> list[tuple[str, dict[str, int]]]:
    """``(what is varied, all three values)`` of every conversion."""
    first = {name: values[0] for name, values in axes.items()}
    return [(name, {**first, name: value}) for name, values in axes.items() for value in values]


def benchmark(axes: dict[str, Sequence[int]], repeats: int) -> dict[str, Any]:
    """All conversions.

    Args:
        axes: ``layers``, ``hidden`` and ``rank`` -> values to try.
        repeats: rounds.
    """
    chosen = settings(axes)
    found: list[list[dict[str, Any]]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            for place, (_, one) in enumerate(chosen):
                source = Path(scratch) / f"{one['hidden']}-{one['layers']}"
                if not source.exists():
                    sizes = {"hidden": one["hidden"], "layers": one["layers"], "vocab": _VOCAB}
                    write_checkpoint(resized(MODELS["1.3b"], **sizes), source)
                found[place].append(convert(source, Path(scratch) / "out", one["rank"], 1, 0, ["--no-check"]))
    rows = [
        {"varied": name, **one}
        | {key: median(run[key] for run in runs) for key in ("tool_seconds", "cpu_s", "solver_s", "peak_bytes")}
        for (name, one), runs in zip(chosen, found, strict=True)
    ]
    return {"machine": machine(), "repeats": repeats, "runs": rows}


def markdown(result: dict[str, Any]) -> str:
    """One line per setting."""
    heads = ["varied", "layers", "hidden size", "rank", "seconds", "CPU s", "solver s", "peak MB"]
    rows = [
        [AXES[row["varied"]], *(str(row[name]) for name in AXES)]
        + [f"{row[key]:.2f}" for key in ("tool_seconds", "cpu_s", "solver_s")]
        + [f"{row['peak_bytes'] / 1e6:,.0f}"]
        for row in result["runs"]
    ]
    head = f"Growth of a conversion on the CPU, one worker, {repeated(result['repeats'])}; CPU s with starting Python"
    return page(result, head, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("growth", repeats=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 1536, 2048])
    parser.add_argument("--rank", type=int, nargs="+", default=[128, 192, 256, 320])
    options = parser.parse_args()
    result = benchmark({name: getattr(options, name) for name in AXES}, options.repeats)
    save(options.out, "growth", result, markdown(result))


if __name__ == "__main__":
    main()
