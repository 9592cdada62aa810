"""Where the exact solver's time goes on square matrices: LAPACK's phases, and what is around them; beside svd_lowrank.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.phases

Random square matrices, rank a quarter, float32, no metric; CPU seconds of one thread, medians of the rounds after the
first, in turn with ``torch.svd_lowrank(q=rank, niter=2)``. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from .harness import new_parser, page
from .measure import machine, markdown_table, repeated, save

PHASES = {
    "syrk": "Gram matrix",
    "sytrd": "tridiagonal form",
    "stedc": "its eigenvectors",
    "ormtr": "back transformation",
}


class Phases:
    """CPU seconds by LAPACK's routine, while it stands in for what calls them."""

    def __init__(self) -> None:
        from svdconvert.linalg import lapack

        self._call, self.seconds = lapack._call, dict[str, float]()
        lapack._call = self

    def __call__(self, name: str, *arguments: Any) -> None:
        start = time.process_time()
        self._call(name, *arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def measure(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Rows: size, and lists of seconds: in all, of each phase, and of svd_lowrank."""
    import torch

    from svdconvert.linalg.exact import factorize
    from svdconvert.linalg.panels import Workspace

    phases, found = Phases(), []
    for size in sizes:
        weight = torch.randn(size, size) * torch.linspace(1, 0.02, size)
        workspace, taken = Workspace(), dict[str, list[float]]()
        for _ in range(repeats + 1):
            phases.seconds.clear()
            start = time.process_time()
            factorize(weight, size // 4, torch.float32, workspace)
            spent = {"in all": time.process_time() - start, **phases.seconds}
            start = time.process_time()
            torch.svd_lowrank(weight, q=size // 4, niter=2)
            spent["svd_lowrank"] = time.process_time() - start
            for name, seconds in spent.items():
                taken.setdefault(name, []).append(seconds)
        found.append({"size": size, "seconds": {name: each[1:] for name, each in taken.items()}})
    return found


def markdown(result: dict[str, Any]) -> str:
    """A table, a line for each size."""
    columns = ["in all", *PHASES, "svd_lowrank"]
    lines = [
        [str(row["size"]), *(f"{median(row['seconds'][name]):.2f}" for name in columns)] for row in result["sizes"]
    ]
    heads = ["size", *(PHASES.get(name, name) for name in columns)]
    return page(result, f"CPU seconds, {repeated(result['repeats'])}", markdown_table(heads, lines))


def main() -> None:
    """Command line."""
    parser = new_parser("phases", repeats=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 3072])
    options: argparse.Namespace = parser.parse_args()
    result = {"machine": machine(), "repeats": options.repeats, "sizes": measure(options.sizes, options.repeats)}
    save(options.out, "phases", result, markdown(result))


if __name__ == "__main__":
    main()
