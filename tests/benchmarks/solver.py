"""One matrix at a time: the package's solver against torch's full and randomised SVD.

    python -m tests.benchmarks.solver                       # the linear layers of the 1.3B and 3.8B models
    python -m tests.benchmarks.solver --models 1.3b --spectrum steep --repeats 5

CPU seconds of one thread, which a busy machine disturbs least; all methods in turn within each round, medians over
the rounds. ``excess`` is how far the factors' error lies above the optimum of Eckart and Young, both in float64.
Everything starts from the float16 weight and ends with two float32 factors. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from .baseline import factor_by_full_svd
from .geometry import MODELS, SPECTRA, Weights, resized
from .harness import new_parser, page
from .measure import machine, markdown_table, repeated, save
from .ratios import overall, overall_line

if TYPE_CHECKING:
    from torch import Tensor

    Method = Callable[[Tensor, int], tuple[Tensor, Tensor]]

OURS = "svdconvert"


def methods() -> dict[str, Method]:
    """Name -> (W, rank) -> (down, up)."""
    import torch

    from svdconvert.linalg.exact import factorize
    from svdconvert.linalg.panels import Workspace

    workspace = Workspace()

    def ours(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        factors = factorize(weight, rank, torch.float32, workspace)
        return factors.down, factors.up

    def randomised(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u, s, v = torch.svd_lowrank(weight.float(), q=rank, niter=2)
        root = s.sqrt()
        return root[:, None] * v.T, u * root

    return {OURS: ours, "linalg.svd": factor_by_full_svd, "svd_lowrank": randomised}


def optimum(weight: Tensor, rank: int) -> float:
    """Frobenius norm of what no rank-r product can reach."""
    import torch

    exact = weight.double()
    gram = exact.T @ exact if exact.shape[0] >= exact.shape[1] else exact @ exact.T
    return float(torch.linalg.eigvalsh(gram)[:-rank].clamp_min(0).sum().sqrt())


def error(weight: Tensor, down: Tensor, up: Tensor) -> float:
    """||W - up @ down||_F."""
    total = 0.0
    for piece, factor in zip(weight.split(1024), up.split(1024), strict=True):
        total += float((piece.double() - factor.double() @ down.double()).square().sum())
    return total**0.5


def benchmark(
    models: Sequence[str], spectrum: str, repeats: int, skip: Sequence[str] = (), hidden: int = 0
) -> dict[str, Any]:
    """All matrices and methods.

    Args:
        models: rows of ``MODELS``; rank a quarter of the hidden size.
        spectrum: see ``geometry``.
        repeats: rounds.
        skip: methods to leave out.
        hidden: another hidden size, or 0.
    """
    import torch

    torch.set_num_threads(1)
    methods()[OURS](torch.eye(8), 2)  # what is imported at the first call
    chosen = {name: method for name, method in methods().items() if name not in skip}
    rows = []
    for model in models:
        geometry = resized(MODELS[model], hidden=hidden)
        weights, rank = Weights(spectrum), geometry.hidden // 4
        for layer, shape in geometry.linears.items():
            weight = weights.matrix(shape, layer)
            best = optimum(weight, rank)
            seconds: dict[str, list[float]] = {name: [] for name in chosen}
            excess: dict[str, float] = {}
            for turn in range(repeats):
                for name, method in chosen.items():
                    torch.manual_seed(turn)
                    start = time.process_time()
                    down, up = method(weight, rank)
                    seconds[name].append(time.process_time() - start)
                    if turn == 0:
                        excess[name] = error(weight, down, up) / best - 1
                    del down, up
            row: dict[str, Any] = {"model": model, "layer": layer, "shape": list(shape), "rank": rank}
            row["optimal_error"] = best / float(weight.double().norm())
            row["cpu_seconds"] = {name: [round(value, 6) for value in values] for name, values in seconds.items()}
            middle = row["median"] = {name: median(values) for name, values in row["cpu_seconds"].items()}
            row["faster"] = {name: middle[name] / middle[OURS] for name in chosen if name != OURS}
            row["excess"] = excess
            rows.append(row)
    return {
        "machine": machine(),
        "spectrum": spectrum,
        "repeats": repeats,
        "load": [round(value, 2) for value in os.getloadavg()],
        "matrices": rows,
        "overall": {name: overall(row["faster"][name] for row in rows) for name in chosen if name != OURS},
    }


def markdown(result: dict[str, Any]) -> str:
    """One line per matrix."""
    names = list(result["matrices"][0]["median"])
    heads = ["matrix", "shape", "rank", *(f"{name}, s" for name in names)]
    heads += [f"faster than {name}" for name in result["overall"]] + [f"excess, {name}" for name in names]
    rows = []
    for row in result["matrices"]:
        times = row["median"]
        line = [f"{row['model']} {row['layer']}", " x ".join(map(str, row["shape"])), str(row["rank"])]
        line += [f"{times[name]:.2f}" for name in names]
        line += [f"{row['faster'][name]:.1f}x" for name in result["overall"]]
        line += [f"{row['excess'][name]:.1e}" for name in names]
        rows.append(line)
    title = (
        f"CPU seconds per matrix, one thread, spectrum {result['spectrum']}, {repeated(result['repeats'])}; "
        f"load average at the end {result['load'][0]:.1f}"
    )
    means = [overall_line(name, found) for name, found in result["overall"].items()]
    return page(result, title, markdown_table(heads, rows), "\n".join(means))


def main() -> None:
    """Command line."""
    parser = new_parser("solver", repeats=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.3b", "3.8b"])
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size")
    parser.add_argument("--spectrum", choices=SPECTRA, default="llm")
    parser.add_argument("--skip", nargs="*", default=[], choices=["linalg.svd", "svd_lowrank"])
    options = parser.parse_args()
    from svdconvert.linalg.lapack import threads

    with threads(1):
        result = benchmark(options.models, options.spectrum, options.repeats, options.skip, options.hidden)
    save(options.out, f"solver-{options.spectrum}", result, markdown(result))


if __name__ == "__main__":
    main()
