"""One budget of bytes for ranks and bits, against rounding all matrices alike, on a real model.

    python -m tests.benchmarks.real.bits --texts wikitext2 --subjects smollm2-135m

Calibration and test text are those of the table of losses (``tests/benchmarks/real/losses.py``). All matrices alike are
rounded to the nearest, or by GPTQ (arXiv:2210.17323) in the second moments of the dense model's inputs, with 1 % of
their mean diagonal added, as tools do it by default; those tools collect the inputs anew behind every rounded block,
which is not done here. Prints lines of the table in docs/rank-or-bits.md, and, with ``--allocation measured``, what was
measured of every way to spend a budget. Folders with price lists stay.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdconvert import convert
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.grids import Grid
from svdconvert.linalg.feedback import SWEEPS, Feedback
from svdconvert.linalg.integers import Rounded, nearest

from .losses import LENGTH, Bench, add_options
from .subjects import SUBJECTS

SHARES = (0.50, 0.35, 0.25, 0.18)
# Beside every budget an even grid of nearly its bytes: .501, .344, .266, .251, .219 and .189.
GRIDS = (Grid(8), Grid(5, 32), Grid(4, 64), Grid(4), Grid(3, 32), Grid(3))
SCALE = torch.bfloat16
DAMPING = 0.01

# (weight [m, n], grid, second moments of its inputs [n, n]) -> the weight on the grid
Way = Callable[[Tensor, Grid, Tensor], Rounded]


def grid_of(text: str) -> Grid:
    """A grid from ``4/64``: bits, and inputs that share a scale; ``4`` alone has a scale per row."""
    return Grid(*(int(part) for part in text.split("/", 1)))


def to_the_nearest(weight: Tensor, grid: Grid, gram: Tensor) -> Rounded:
    """Without regard to the inputs."""
    return nearest(weight, grid, SCALE)


def gptq(weight: Tensor, grid: Grid, gram: Tensor, sweeps: int = 0) -> Rounded:
    """In the inputs' second moments, with or without the coordinate descent that ``--bytes`` has."""
    damped = gram.double() + DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    return Feedback(damped).round(weight, grid, SCALE, sweeps)


WAYS: Mapping[str, Way] = {
    "to the nearest": to_the_nearest,
    "GPTQ": gptq,
    "GPTQ and descent": partial(gptq, sweeps=SWEEPS),
}


def alike(bench: Bench, grid: Grid, way: Way, out: Path) -> tuple[float, float | None]:
    """A dense folder whose target matrices are all on one grid; gives the share of their bytes, and no prediction."""
    stats = StatisticsFolder(bench.statistics("empirical"))
    shutil.copytree(bench.model, out)
    stored = whole = 0
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            module = name.removeprefix("model.").removesuffix(".weight")
            if not module.endswith("_proj"):
                continue
            gram = stats.load([module])[module].input_gram
            assert gram is not None
            shape = (weight.shape[0], weight.shape[1])
            stored, whole = stored + grid.nbytes(shape), whole + 2 * weight.numel()
            tensors[name] = way(weight.float(), grid, gram).values(torch.float32).to(weight.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return stored / whole, None


def by_budget(bench: Bench, share: float, allocation: str, out: Path) -> tuple[float, float | None]:
    """A result of ``--bytes``; gives the share that was asked for, and the predicted loss."""
    report = convert(
        bench.model, out, bytes=share, allocation=allocation, dtype="bfloat16", stats=bench.statistics("empirical"),
        work=bench.work / "work-bits", device="cpu", check=False,
    )  # fmt: skip
    record = report.outcome.record
    print(
        f"{len(record['matrices'])} products, {len(record['rounded'])} rounded; {record.get('budget', '')}", flush=True
    )
    return share, float(record["predicted_loss"])


def measure(bench: Bench, name: str, make: Callable[[Path], tuple[float, float | None]]) -> None:
    """Print a line of the table; leaves no model."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        share, predicted = make(out)
        found = bench.likelihood(out).divergence
    assert found is not None
    cells = [name, f"{share:.3f}", "" if predicted is None else f"{predicted:.4f}"]
    cells += [f"{found.kl:.4f}", f"{found.added:+.4f}", f"{found.agreement:.1%}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.bits")
    add_options(parser)
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES), help="budgets of --bytes")
    parser.add_argument("--alike", nargs="*", choices=WAYS, default=list(WAYS), help="ways to round all alike")
    parser.add_argument(
        "--grids", nargs="*", type=grid_of, default=list(GRIDS), metavar="BITS/GROUP",
        help="grids of those; a scale per row without the group",
    )  # fmt: skip
    parser.add_argument("--allocation", choices=("global", "measured"), default="global", help="of --bytes")
    options = parser.parse_args(arguments)
    for name in options.subjects:
        subject = SUBJECTS[name]
        samples = options.samples or subject.calibration
        bench = Bench(subject, options.folder, options.texts, samples, subject.windows)
        print(
            f"{subject.title}, {samples * LENGTH:,} calibration tokens, tested on {bench.passage.tokens:,}", flush=True
        )
        for share in options.shares:
            measure(bench, "--bytes", partial(by_budget, bench, share, options.allocation))
        for grid, title in itertools.product(options.grids, options.alike):
            measure(bench, f"{grid}, {title}", partial(alike, bench, grid, WAYS[title]))


if __name__ == "__main__":
    main()
