"""float32 products of linear layers by the routines that factored layers choose among: MKL, oneDNN, and MKL by columns.

    python -m tests.benchmarks.routines
    OMP_NUM_THREADS=1 python -m tests.benchmarks.routines --cpu-time

Weights [out, in] of a LLaMA or GPT-NeoX block at rank 512 and dense, by some numbers of rows. Each product takes the
next one of as many weights as it takes to leave the caches, all routines in turn within each round; medians over the
rounds. Of one row the rate at which weights are read is told, too. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from .harness import new_parser, page
from .measure import machine, markdown_table, repeated, save

SHAPES = ((512, 2048), (2048, 512), (8192, 512), (512, 8192), (8192, 2048))
CACHES = 2**28  # bytes


def routines() -> Mapping[str, tuple[Callable[[Any, Any], Any], bool]]:
    """Name -> the product of rows and a weight, and whether the weight is stored by columns."""
    from svdconvert.modeling.modeling_llama_svd import _onednn
    from torch.nn.functional import linear

    return {"MKL": (linear, False), "oneDNN": (_onednn, False), "MKL, by columns": (linear, True)}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: shape, number of rows, and the microseconds of a product by each routine, in all rounds."""
    import torch

    clock, found = time.process_time if options.cpu_time else time.perf_counter, []
    for shape in SHAPES:
        weights = [torch.randn(shape) for _ in range(CACHES // (4 * shape[0] * shape[1]))]
        by_columns = [weight.t().contiguous().t() for weight in weights]
        for rows in options.rows:
            x, taken = torch.randn(rows, shape[1]), dict[str, list[float]]()
            for _ in range(options.repeats + 1):
                for name, (product, columns) in routines().items():
                    start = clock()
                    for weight in by_columns if columns else weights:
                        product(x, weight)
                    taken.setdefault(name, []).append((clock() - start) / len(weights) * 1e6)
            found.append({"shape": shape, "rows": rows, "us": {name: each[1:] for name, each in taken.items()}})
    return found


def markdown(result: dict[str, Any]) -> str:
    """A table: microseconds of each routine, oneDNN against MKL, and GB/s of one row."""
    names, lines = list(result["products"][0]["us"]), []
    for found in result["products"]:
        middle = {name: median(taken) for name, taken in found["us"].items()}
        size = 4 * found["shape"][0] * found["shape"][1]
        rates = [f"{size / middle[name] / 1e3:.1f}" if found["rows"] == 1 else "" for name in names]
        figures = [f"{middle[name]:,.0f}" for name in names]
        share = f"{middle['oneDNN'] / middle['MKL']:.2f}"
        lines.append(["{} x {}".format(*found["shape"]), str(found["rows"]), *figures, share, *rates])
    heads = [
        "out x in",
        "rows",
        *(f"{name}, us" for name in names),
        "oneDNN / MKL",
        *(f"{name}, GB/s" for name in names),
    ]
    title = (
        f"{result['threads']} threads, {'CPU' if result['cpu_time'] else 'wall'} time, {repeated(result['repeats'])}"
    )
    return page(result, title, markdown_table(heads, lines))


def main() -> None:
    """Command line."""
    parser = new_parser("routines", repeats=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process instead of the clock's")
    options = parser.parse_args()
    import torch

    with torch.inference_mode():
        products = measure(options)
    settings = {"cpu_time": options.cpu_time, "repeats": options.repeats, "threads": torch.get_num_threads()}
    result = {"machine": machine(), **settings, "products": products}
    save(options.out, "routines", result, markdown(result))


if __name__ == "__main__":
    main()
