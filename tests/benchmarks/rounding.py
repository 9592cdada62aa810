"""What 16-bit storage adds to the loss of a truncation, where a few input channels are massive.

python -m tests.benchmarks.rounding
"""

from __future__ import annotations

import argparse
import math
from unittest.mock import patch

import torch
from torch import Tensor

from svdconvert.linalg import bases
from svdconvert.linalg.exact import decompose, truncate
from svdconvert.linalg.pivot import pivot, product, rounded_coefficients
from svdconvert.linalg.results import Decomposition
from svdconvert.linalg.rounding import round_with_feedback

# How the inputs' massive channels behave: there are none; their values vary; they vary about a large mean.
KINDS = ("benign", "massive", "offset")

# Standard deviation, or mean, of the massive channels; those of the others lie between about 0.1 and 3.
SIZES = (800, -500, 300)


def spectral(m: int, n: int, seed: int) -> Tensor:
    """A matrix with a power law of singular values: [m, n] float64."""
    random, k = torch.Generator().manual_seed(seed), min(m, n)
    left, right = (torch.linalg.qr(torch.randn(size, k, generator=random, dtype=torch.float64))[0] for size in (m, n))
    return (left * (torch.arange(1, k + 1, dtype=torch.float64) ** -0.5 + 0.1)) @ right.T


def second_moments(n: int, kind: str, seed: int) -> Tensor:
    """E[x x^T] of 4 n samples of correlated inputs: [n, n] float64."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))[0]
    spread = math.sqrt(n) / 3 * torch.arange(1, n + 1, dtype=torch.float64) ** -0.5
    inputs = torch.randn(4 * n, n, generator=random, dtype=torch.float64) * spread @ basis.T
    if kind != "benign":
        for place, size in enumerate(SIZES):
            channel = (2 * place + 1) * n // 7
            inputs[:, channel] = inputs[:, channel] * abs(size) + (size if kind == "offset" else 0)
    return inputs.T @ inputs / len(inputs)


def _row(m: int, n: int, kind: str, dtype: torch.dtype) -> str:
    weight, gram, rank = spectral(m, n, 0), second_moments(n, kind, 1), min(m, n) // 4
    found = decompose(weight, right=gram)
    tail = float(found.spectrum[rank:].sum())
    kept = gram if m >= n else gram.diagonal()

    def excess(approximation: Tensor) -> str:
        error = weight - approximation
        return f"{float((error @ gram * error).sum()) / tail - 1:.1e}"

    with patch.object(bases, "BASES", {}):
        plain = truncate(weight, found, rank, dtype, right=kept)
    ours = truncate(weight, found, rank, dtype, right=kept)
    exact = truncate(weight, found, rank, torch.float64, right=kept)
    rows, coefficients, position = pivot(exact.up, exact.down, dtype)
    wanted = weight if m >= n else exact.up @ exact.down
    unrounded = pivot(exact.up, exact.down, torch.float64)[0]
    fed_back = round_with_feedback(unrounded, kept if kept.dim() == 2 else kept.diag(), dtype)
    pivoted = [(rows, coefficients)]
    pivoted += [(each, rounded_coefficients(wanted, each, position, kept, dtype)) for each in (rows, fed_back)]
    cells = [
        f"{m} x {n}",
        kind,
        str(dtype)[6:],
        excess(plain.up.double() @ plain.down.double()),
        excess(_reserved(weight, found, rank, dtype, gram)),
        excess(ours.up.double() @ ours.down.double()),
        ours.basis,
        *(excess(product(*each, position)) for each in pivoted),
    ]
    return f"| {' | '.join(cells)} |"


def _reserved(weight: Tensor, found: Decomposition, rank: int, dtype: torch.dtype, gram: Tensor) -> Tensor:
    """The product of rank r - 1, rounded, plus the best product of rank 1 for what it lacks, rounded."""
    with patch.object(bases, "BASES", {}):
        first = truncate(weight, found, rank - 1, dtype, right=gram)
    so_far = first.up.double() @ first.down.double()
    lacking = weight - so_far
    last = truncate(lacking, decompose(lacking, right=gram), 1, dtype, right=gram)
    return so_far + last.up.double() @ last.down.double()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="the smaller side; a quarter of it is the rank")
    size = parser.parse_args().size
    heads = ["shape", "inputs", "type", "nearest", "reserved rank", "svdconvert", "basis"]
    heads += ["pivoted, nearest", "svdconvert", "rows with feedback too"]
    print(f"| {' | '.join(heads)} |")
    print("| --- | --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for dtype in (torch.bfloat16, torch.float16):
        for kind in KINDS:
            for m, n in ((3 * size, size), (size, 3 * size)):
                print(_row(m, n, kind, dtype), flush=True)


if __name__ == "__main__":
    main()
