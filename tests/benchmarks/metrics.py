"""One matrix at a time in calibrated metrics: the package's solver against SVD-LLM's recipe.

    python -m tests.benchmarks.metrics                        # the linear layers of the 1.3B model, whitened
    python -m tests.benchmarks.metrics --sides two            # the same in metrics of both sides, a quarter of an hour
    python -m tests.benchmarks.metrics --sides two --hidden 1024 --repeats 3

CPU seconds of one thread; both in turn within each round, medians over the rounds. The second moments are those of
inputs of uneven scale with a few massive channels, which is what activations of language models look like, from four
times as many tokens as there are channels. ``error`` is ||L^1/2 (W - BA) R^1/2||_F over that of W, in float64. Both
start from the float16 weight and end with two float32 factors. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import math
import os
import time
from statistics import median
from typing import TYPE_CHECKING, Any

from .baseline import factor_by_whitening
from .geometry import MODELS, Weights, resized
from .harness import add_sizes, new_parser, page
from .measure import machine, markdown_table, repeated, save
from .ratios import overall, overall_line

if TYPE_CHECKING:
    from torch import Tensor

MASSIVE, MASSIVE_SCALE = 4, 30.0


def second_moment(size: int, seed: int) -> Tensor:
    """[size, size] float64."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(size, generator=generator).mul_(0.5).exp_()
    scales[torch.randperm(size, generator=generator)[:MASSIVE]] *= MASSIVE_SCALE
    gram = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(4):
        # Rows that share a direction, so that channels are correlated.
        tokens = torch.randn(size, size, generator=generator)
        tokens += 0.5 * tokens[:, torch.randperm(size, generator=generator)]
        exact = (tokens * scales).double()
        gram.addmm_(exact.T, exact)
    return gram / (4 * size)


def error(weight: Tensor, down: Tensor, up: Tensor, right: Tensor, left: Tensor | None) -> float:
    """||L^1/2 (W - BA) R^1/2||_F over that of W."""
    exact = weight.double()

    def energy(matrix: Tensor) -> float:
        seen = matrix @ right
        return float((seen * (matrix if left is None else left @ matrix)).sum())

    return math.sqrt(energy(exact - up.double() @ down.double()) / energy(exact))


def benchmark(model: str, hidden: int, sides: str, repeats: int) -> dict[str, Any]:
    """All matrices of one layer.

    Args:
        model: row of ``MODELS``; rank a quarter of the hidden size.
        hidden: another hidden size, or 0.
        sides: ``one`` (inputs) or ``two`` (inputs and outputs).
        repeats: rounds.
    """
    import torch

    from svdconvert.linalg.exact import factorize
    from svdconvert.linalg.panels import Workspace

    torch.set_num_threads(1)
    factorize(torch.eye(8), 2, torch.float32)  # what is imported at the first call
    geometry, workspace, rows = resized(MODELS[model], hidden=hidden), Workspace(), []
    for number, (layer, shape) in enumerate(geometry.linears.items()):
        weight, rank = Weights("llm").matrix(shape, layer), geometry.hidden // 4
        right = second_moment(shape[1], number)
        left = second_moment(shape[0], 100 + number) if sides == "two" else None

        def ours(weight: Any = weight, rank: int = rank, right: Any = right, left: Any = left) -> tuple[Any, Any]:
            factors = factorize(weight, rank, torch.float32, workspace, left, right)
            return factors.down, factors.up

        def theirs(weight: Any = weight, rank: int = rank, right: Any = right, left: Any = left) -> tuple[Any, Any]:
            down, up = factor_by_whitening(weight, rank, right, left)
            return down.float(), up.float()

        seconds: dict[str, list[float]] = {"svdconvert": [], "SVD-LLM": []}
        errors: dict[str, float] = {}
        for turn in range(repeats):
            for name, method in (("svdconvert", ours), ("SVD-LLM", theirs)):
                start = time.process_time()
                down, up = method()
                seconds[name].append(time.process_time() - start)
                if turn == 0:
                    errors[name] = error(weight, down, up, right, left)
        middle = {name: round(median(values), 6) for name, values in seconds.items()}
        rows.append(
            {"layer": layer, "shape": list(shape), "rank": rank, "cpu_seconds": seconds, "median": middle}
            | {"error": errors, "ratio": middle["SVD-LLM"] / middle["svdconvert"]}
        )
    return {
        "machine": machine(),
        "model": model,
        "hidden": geometry.hidden,
        "sides": sides,
        "repeats": repeats,
        "load": [round(value, 2) for value in os.getloadavg()],
        "matrices": rows,
        "overall": overall(row["ratio"] for row in rows),
    }


def markdown(result: dict[str, Any]) -> str:
    """One line per matrix."""
    rows = [
        [
            row["layer"],
            " x ".join(map(str, row["shape"])),
            str(row["rank"]),
            *(f"{row['median'][name]:.2f}" for name in ("svdconvert", "SVD-LLM")),
            f"{row['ratio']:.1f}x",
            *(f"{row['error'][name]:.6f}" for name in ("svdconvert", "SVD-LLM")),
        ]
        for row in result["matrices"]
    ]
    heads = ["matrix", "shape", "rank", "svdconvert, s", "SVD-LLM, s", "faster", "error, svdconvert", "error, SVD-LLM"]
    title = (
        f"CPU seconds per matrix, one thread, metrics on {result['sides']} side(s), {repeated(result['repeats'])}; "
        f"load average at the end {result['load'][0]:.1f}"
    )
    mean = overall_line("SVD-LLM's recipe", result["overall"])
    return page(result, title, markdown_table(heads, rows), mean)


def main() -> None:
    """Command line."""
    parser = new_parser("metrics", repeats=3)
    add_sizes(parser, vocab=False)
    parser.add_argument("--sides", choices=["one", "two"], default="one")
    options = parser.parse_args()
    from svdconvert.linalg.lapack import threads

    with threads(1):
        result = benchmark(options.model, options.hidden, options.sides, options.repeats)
    save(options.out, f"metrics-{options.sides}", result, markdown(result))


if __name__ == "__main__":
    main()
