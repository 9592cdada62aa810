"""The least-squares partner of a factor: the other factor that loses least beside it.

With S the factor on one side of W and M the metric there, the partner is W M S (S^T M S)^-1; the metric on the other
side plays no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg import lapack
from svdconvert.linalg.panels import Scaled
from svdconvert.linalg.precision import CANCELLATION
from svdconvert.linalg.products import product, solve_by_root
from svdconvert.linalg.residual import residual

# Diagonal entries of the Cholesky factor for columns of length 1. Above it those are nearly orthogonal, and an inverse
# is as good as two triangular solves, which take twice the time.
NEARLY_ONE = 0.9


def pseudo_inverse(small: Tensor, weighted: Tensor, ridge: float = 0.0) -> Tensor:
    """(S^T M S + ridge)^-1 S^T M for a factor S.

    Args:
        small: S, [k, r].
        weighted: M S, [k, r], M the metric on the factor's side.
        ridge: added to the diagonal of S^T M S, where that is near the identity but may be singular.

    Returns:
        [r, k].
    """
    if ridge:
        overlap = product(small.T, weighted)
        overlap.diagonal().add_(ridge)
        return solve_by_root(torch.linalg.cholesky(overlap), weighted.T)
    return _solved(*_overlap(small, weighted))


def _overlap(small: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S^T M S and M S with the columns of S brought to length 1 in M, and their lengths: [r, r], [k, r] and [r].

    The first is near the identity: without metrics but for the rounding of `small`, with metrics likewise.
    """
    norms = (small * weighted).sum(dim=0).clamp_min(0).sqrt()
    inverse = _inverse(norms)
    unit = weighted * inverse
    if weighted is small and small.device.type == "cpu":  # half the arithmetic
        overlap = torch.zeros(small.shape[1], small.shape[1], dtype=small.dtype)
        lapack.add_gram(unit, overlap)
        overlap += overlap.tril(-1).T
    else:
        overlap = product((small * inverse).T, unit)
    overlap.diagonal().copy_(torch.where(norms > 0, overlap.diagonal(), 1))
    return overlap, unit, norms


def _solved(overlap: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The pseudo-inverse, of what :func:`_overlap` gives: [r, k]."""
    root, failed = torch.linalg.cholesky_ex(overlap)
    if int(failed):  # rounding made columns of a rank-deficient matrix dependent
        solved = product(torch.linalg.pinv(overlap, hermitian=True), unit.T)
    elif unit.device.type == "cpu" and unit.dtype == torch.float32 and bool((root.diagonal() > NEARLY_ONE).all()):
        solved = torch.mm(torch.cholesky_inverse(root), unit.T)
    else:
        solved = solve_by_root(root, unit.T)
    return solved * _inverse(norms)[:, None]


def _inverse(norms: Tensor) -> Tensor:
    """1 / n, and 0 of 0."""
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)


def partner(matrix: Scaled, solved: Tensor) -> Tensor:
    """The least-squares partner of a factor.

    Args:
        matrix: W, [m, n].
        solved: [r, k], the pseudo-inverse of the factor on the smaller side (of n if tall, of m if wide).

    Returns:
        [m, r] if tall, for W ~ other small^T; [r, n] if wide, for W ~ small other. Columns of the factor that the
        metric does not see give zeros.
    """
    m, n = matrix.weight.shape
    rank = solved.shape[0]
    other = torch.empty((m, rank) if matrix.tall else (rank, n), dtype=solved.dtype, device=solved.device)
    for part, piece in matrix.panels(solved.dtype):
        if matrix.tall:
            product(piece, solved.T, out=other[part])
        else:
            other[:, part] = product(solved, piece)
    return other


def plain_partner(matrix: Scaled, small: Tensor, half: float, dtype: torch.dtype, total: float) -> tuple[Tensor, float]:
    """The least-squares partner without metrics, rounded panel by panel, so that no float32 copy of it is made.

    Returns:
        ``(large, loss)``: the partner in the storage type, and ||W - product||^2 of the rounded factors.
    """
    m, n = matrix.weight.shape
    rank, work = small.shape[1], matrix.work
    overlap, unit, norms = _overlap(small, small)
    solved, gram = _solved(overlap, unit, norms), overlap * norms[:, None] * norms
    large = torch.empty((m, rank) if matrix.tall else (rank, n), dtype=dtype, device=small.device)
    loss = total
    for part, piece in matrix.panels(small.dtype):
        # [p, r], or [r, p] if wide, in buffers: fresh memory would cost more than what is done with it
        target = large[part] if matrix.tall else large[:, part]
        best, stored, weighted = (
            work.take(name, tuple(target.shape), small.dtype, small.device) for name in ("best", "stored", "weighted")
        )
        torch.mm(*((piece, solved.T) if matrix.tall else (solved, piece)), out=best)
        if half != 1:
            best.div_(half)
        stored.copy_(target.copy_(best))
        # The residual of `best` is orthogonal to `small`: loss = |W|^2 - |best|^2 + |stored - best|^2 in its metric.
        torch.mm(*((stored, gram) if matrix.tall else (gram, stored)), out=weighted)
        rows = weighted.mul_(best.mul_(-2).add_(stored)).sum(dim=1)
        loss += half**2 * float(rows.sum(dtype=torch.float64))
    if loss < CANCELLATION[small.dtype] * total:
        loss = residual(matrix, small, large, half)[0]
    return large, max(loss, 0.0)
