"""Plain truncations on a GPU: matrices of one shape at a time, and nothing that the host has to wait for.

The arithmetic is that of ``linalg/exact.py`` without metrics in float32, for all matrices of a stack at once. What
would be decided on the way there (was float32 enough, is every entry finite) is decided afterwards, by a few numbers
that come with the factors: a matrix that asks for more is done again, by itself, by the solver. So the host can go on
to the next stack while the device is at work. The one wait that is left is inside ``torch.linalg.eigh``, for its error
code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.precision import CANCELLATION, float32_is_enough, least_tail, scale_of
from svdconvert.linalg.residual import relative, residual_of
from svdconvert.linalg.results import SINGULAR, Factors

# Rows (or columns) of each matrix that are brought to float32 at a time: a GPU needs longer ones than a CPU.
PANEL = 4096

# What is known of each matrix, in this order: its largest absolute entry; the highest eigenvalue and the lowest wanted
# one; the squared norm of the matrix, and the same as the sum of all eigenvalues; the norm of G Q - Q diag(values) for
# the wanted eigenvectors Q of its Gram matrix G, over that of the values; squared norms of what the best product loses
# by its eigenvalues and of what the rounded one does; whether the columns of the rounded smaller factor are
# independent, and whether both factors are finite.
FACTS = ("largest", "highest", "lowest", "energy", "total", "astray", "tail", "loss", "independent", "finite")

# Batched eigensolvers have given wrong vectors without a word (pytorch/pytorch#192483, cuSOLVER before 11.7.3), so they
# are not trusted: eigenvalues have to add up to the squared norm, and eigenvectors to be some, within these shares; and
# the product may lose more than its eigenvalues say by the last of them, and by what rounding explains.
SUM_SHARE, VECTOR_SHARE, LOSS_SHARE = 1e-4, 1e-3, 1e-2


@dataclass(frozen=True)
class StackedFactors:
    """Balanced factors of a stack of matrices, W ~ up @ down each, not looked at yet.

    Attributes:
        down: [s, r, n].
        up: [s, m, r].
        facts: [s, 10] float64, see :data:`FACTS`.
    """

    down: Tensor
    up: Tensor
    facts: Tensor


def factorize_stack(weights: Tensor, rank: int, dtype: torch.dtype) -> StackedFactors:
    """Best rank-r approximations of matrices of one shape (Eckart and Young, 1936), as balanced factors.

    Args:
        weights: [s, m, n], any floating type, on the device that is to do the work. Nothing is refused: whatever the
            entries are, the facts tell.
        rank: 1 <= rank <= min(m, n).
        dtype: storage type of the factors.
    """
    low, high = torch.aminmax(weights.flatten(1), dim=1)  # NaN wins in both
    count, m, n = weights.shape
    tall, k = m >= n, min(m, n)
    gram = torch.zeros(count, k, k, device=weights.device)
    for _, piece in _panels(weights):
        rows = piece if tall else piece.mT
        gram.baddbmm_(rows.mT, rows)
    energy = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    # The eigensolver raises an error for what is not finite, instead of giving it on.
    values, vectors = torch.linalg.eigh(gram.nan_to_num_(0.0, 0.0, 0.0))
    wanted, leading = values[:, -rank:].flip(1), vectors[..., -rank:].flip(2)
    astray = torch.linalg.vector_norm(gram @ leading - leading * wanted[:, None], dim=(1, 2))
    astray = astray / torch.linalg.vector_norm(wanted, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    small = (leading * wanted.clamp_min(0).pow(0.25)[:, None]).to(dtype)
    del gram, vectors, leading
    values = values.double()
    kept = values.clamp_min(0)
    lifted = small.float()
    solved, independent = _pseudo_inverse(lifted)
    overlap = lifted.mT @ lifted
    large = torch.empty((count, m, rank) if tall else (count, rank, n), dtype=dtype, device=weights.device)
    loss = energy
    for part, piece in _panels(weights):
        best = piece @ solved.mT if tall else (solved @ piece).mT  # [s, p, r]
        rounded = best.to(dtype)
        (large[:, part] if tall else large[:, :, part].mT).copy_(rounded)
        stored = rounded.float()
        # as in the solver: what the best partner leaves, and what rounding it adds
        loss = loss + ((stored @ overlap) * (stored - 2 * best)).sum((1, 2), dtype=torch.float64)
    finite = torch.isfinite(small).flatten(1).all(1) & torch.isfinite(large).flatten(1).all(1)
    facts = [torch.maximum(high, -low), values[:, -1], values[:, -rank], energy, kept.sum(1), astray]
    facts += [kept[:, :-rank].sum(1), loss, independent, finite]
    down, up = (small.mT.contiguous(), large) if tall else (large, small.contiguous())
    return StackedFactors(down, up, torch.stack([fact.double() for fact in facts], 1))


def settle(weights: Tensor, found: StackedFactors, facts: Tensor) -> list[Factors | None]:
    """What became of each matrix, once the device is through.

    Args:
        weights, found: argument and result of :func:`factorize_stack`.
        facts: those of ``found``, on the CPU.

    Returns:
        The factors, on the device; None for a matrix that :func:`svdconvert.linalg.exact.factorize` has to do again:
        it is not finite, its squares leave float32's range, its singular values are too far apart or the rest of them
        too small, the factors leave the range of their type, or the eigensolver was wrong.
    """
    settled: list[Factors | None] = []
    for weight, down, up, row in zip(weights, found.down, found.up, facts.tolist(), strict=True):
        told = dict(zip(FACTS, row, strict=True))
        energy, tail, loss = told["energy"], told["tail"], max(told["loss"], 0.0)
        good = math.isfinite(told["largest"]) and scale_of(told["largest"]) == 1 and told["independent"]
        resolved = len(down) == min(weight.shape) or tail >= least_tail(min(weight.shape), told["highest"])
        if not (good and told["finite"] and resolved and float32_is_enough(told["highest"], told["lowest"])):
            settled.append(None)
            continue
        if loss < CANCELLATION[torch.float32] * energy:
            loss = residual_of(weight, down, up)
        rounding = 16 * torch.finfo(down.dtype).eps ** 2 + 1e-6  # of float32's sums
        excess, whole = loss - tail, abs(told["total"] - energy)
        sound = whole <= SUM_SHARE * energy and told["astray"] <= VECTOR_SHARE
        if not sound or excess > LOSS_SHARE * tail + rounding * energy:
            settled.append(None)
            continue
        error, tail = relative(loss, energy), min(tail, loss)
        settled.append(
            Factors(
                down=down,
                up=up,
                relative_error=error,
                optimal_error=relative(tail, energy),
                metric_error=error,
                metric_loss=loss,
                rounding_excess=(loss - tail) / tail if tail > 0 else None,
                basis=SINGULAR,
                precision="float32",
            )
        )
    return settled


def _panels(weights: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of all matrices along the longer side, float32: [s, p, n] if they are tall, [s, m, p] if wide."""
    _, m, n = weights.shape
    for start in range(0, max(m, n), PANEL):
        part = slice(start, min(start + PANEL, max(m, n)))
        yield part, (weights[:, part] if m >= n else weights[:, :, part]).float()


def _pseudo_inverse(small: Tensor) -> tuple[Tensor, Tensor]:
    """(S^T S)^-1 S^T of each [k, r] of a stack: [s, r, k]; and [s], whether its columns are independent.

    Columns of zeros give zeros and do not count.
    """
    norms = torch.linalg.vector_norm(small, dim=1)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(small.dtype).tiny), 0)
    unit = small * inverse[:, None]
    overlap = unit.mT @ unit  # near the identity, but for the rounding of `small`
    diagonal = overlap.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.where(norms > 0, diagonal, 1))
    root, failed = torch.linalg.cholesky_ex(overlap)
    half = torch.linalg.solve_triangular(root, unit.mT, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True) * inverse[..., None], failed == 0
