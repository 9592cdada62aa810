"""The least-squares partner of a factor: the other factor that loses least beside it.

With S the factor on one side of W and M the metric there, the partner is W M S (S^T M S)^-1; the metric on the other
side plays no part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.panels import Scaled
from svdconvert.linalg.precision import CANCELLATION
from svdconvert.linalg.products import product, solve_by_root
from svdconvert.linalg.residual import residual


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
    norms = (small * weighted).sum(dim=0).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(small.dtype).tiny), 0)
    # Near the identity: without metrics but for the rounding of `small`, with metrics likewise.
    overlap = product((small * inverse).T, weighted * inverse)
    overlap.diagonal().copy_(torch.where(norms > 0, overlap.diagonal(), 1))
    root, failed = torch.linalg.cholesky_ex(overlap)
    if int(failed):  # rounding made columns of a rank-deficient matrix dependent
        solved = product(torch.linalg.pinv(overlap, hermitian=True), (weighted * inverse).T)
    else:
        solved = solve_by_root(root, (weighted * inverse).T)
    return solved * inverse[:, None]


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
    rank = small.shape[1]
    solved, gram = pseudo_inverse(small, small), small.T @ small
    large = torch.empty((m, rank) if matrix.tall else (rank, n), dtype=dtype, device=small.device)
    loss = total
    for part, piece in matrix.panels(small.dtype):
        best = piece @ solved.T if matrix.tall else (solved @ piece).T  # [p, r]
        rounded = (best / half).to(dtype)
        (large[part] if matrix.tall else large[:, part].T).copy_(rounded)
        stored = rounded.to(best.dtype) * half
        # The residual of `best` is orthogonal to `small`: loss = |W|^2 - |best|^2 + |stored - best|^2 in its metric.
        loss += float(((stored @ gram) * (stored - 2 * best)).sum(dtype=torch.float64))
    if loss < CANCELLATION[small.dtype] * total:
        loss = residual(matrix, small, large, half)[0]
    return large, max(loss, 0.0)
