"""One input-side factor for the matrices of several layers (Basis Sharing, arXiv:2410.03765; LightFormer).

    minimise  sum_i tr( L_i (W_i - B_i A) R_i (W_i - B_i A)^T )        W_i: m_i x n,  A: r x n,  B_i: m_i x r

In one input metric R for all layers this is the problem of ``linalg/exact.py`` for the W_i stacked, [sum m_i, n], with
the L_i as blocks of one output metric. So A is that of the stack in the mean of the R_i, weighted by their tokens. Each
B_i is then the least-squares partner of A in the layer's own metric, W_i R_i A^T (A R_i A^T)^-1, which is the optimum
for this A whatever L_i is.

What each rank leaves in the layers' own metrics is known for all ranks at once. With the rows of A in descending order,
A R_i A^T = C C^T (Cholesky) and Q = A R_i W_i^T L_i W_i R_i A^T, rank r captures the first r diagonal entries of
C^-1 Q C^-T, since the leading blocks of C are the Cholesky factors of the leading rows. A layer may not have seen some
of the rows at all, and A R_i A^T is then singular: so a ridge is added to it, here as in the partners.

The Gram matrix on the stack's smaller side decides what has to be known of a layer. A tall stack needs W_i^T L_i W_i,
[n, n]; a wide one, sum m_i < n, needs L_i itself and the weights. Both need R_i. One layer's matrices are in memory at
a time, beside the sums: about eight matrices of the smaller side's or the input's size in float64.

Without metrics none of this is needed: the stack is one matrix to ``linalg/exact.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from svdconvert.linalg.exact import decompose, decompose_gram, factorize, truncate
from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import PANEL, Scaled, Workspace
from svdconvert.linalg.partner import partner, pseudo_inverse
from svdconvert.linalg.precision import check_entries, refuse_overflowing_factor
from svdconvert.linalg.residual import relative_error
from svdconvert.linalg.results import Decomposition

# Added to A R_i A^T, which is the identity in the mean over the layers: input directions that the calibration text has
# hardly shown to one layer are taken from what it has shown to the others.
RIDGE = 1e-6


@dataclass(frozen=True)
class SharedDecomposition:
    """What a truncation of a group of layers needs, computed once.

    Attributes:
        found: basis [n, k], k = min(sum m_i, n): column j is a row of A, the last one comes first. All rows are
            orthonormal in the mean input metric, or zero. Values: what each adds to what the layers capture together.
        captured: [layers, k] float64, descending ranks: what each row of A adds to what a layer captures in its own
            metrics; the sum over all is the whole, and that over the rows left out is the loss.
    """

    found: Decomposition
    captured: Tensor


@dataclass(frozen=True)
class SharedFactors:
    """W_i ~ ups[i] @ down.

    Attributes:
        down: [r, n].
        ups: one [m_i, r] a layer.
        relative_errors: ||W_i - ups[i] @ down||_F / ||W_i||_F as they are stored.
        precision: ``float32`` or ``float64``, what the eigenproblem was solved in.
    """

    down: Tensor
    ups: list[Tensor]
    relative_errors: list[float]
    precision: str


def outer_statistic(weight: Tensor, left: Metric, *, tall: bool) -> Metric:
    """What a group must know of a layer's weight and output metric.

    Args:
        weight: W_i, [m, n].
        left: L_i: [m, m], its diagonal [m], or None for the identity.
        tall: whether the stack has at least as many rows as columns.

    Returns:
        W_i^T L_i W_i, [n, n] float64, for a tall stack; L_i for a wide one.

    Raises:
        InputError: the matrix has NaN or infinite entries.
    """
    check_entries(weight)
    if not tall:
        return left
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    whole = weight.double() if left is not None and left.dim() == 2 else None
    for start in range(0, weight.shape[0], PANEL):
        part = slice(start, start + PANEL)
        rows = weight[part].double()
        if left is None:
            weighted = rows
        elif whole is not None:
            weighted = left[part].double() @ whole
        else:
            weighted = left[part].double()[:, None] * rows
        gram.addmm_(rows.T, weighted)
    return gram


def decompose_shared(
    outers: Sequence[Callable[[], Metric]],
    inners: Sequence[Callable[[], Tensor]],
    tokens: Sequence[int],
    weights: Sequence[Tensor] | None,
    workspace: Workspace | None = None,
) -> SharedDecomposition:
    """The rows of A and what each is worth.

    Args:
        outers: loads the :func:`outer_statistic` of each layer.
        inners: loads R_i of each layer: [n, n] or its diagonal [n].
        tokens: what each R_i was averaged over.
        weights: W_i, [m_i, n], for a wide stack; None for a tall one.
        workspace: buffers to reuse.
    """
    work = workspace or Workspace()
    pooled = _sum(inners[i]().double() * (count / sum(tokens)) for i, count in enumerate(tokens))
    if weights is None:
        gram = _sum(_matrix(load()) for load in outers)
        found = decompose_gram(gram, pooled, work)
        del gram
        rows = found.basis * _inverse(found.values).sqrt()
    else:
        left = _blocks([load() for load in outers])
        stack = torch.cat(list(weights))
        found = decompose(stack, work, left, pooled)
        # U^T L U is the matrix of the values, but the identity where there is no L
        lengths = _inverse(found.values) if left is not None else _inverse(found.values).sqrt()
        rows = stack.double().T @ apply_metric(left, found.basis) * lengths
        del stack, left
    del pooled
    rows = rows.flip(1)
    captured = torch.stack(
        [
            _captured(rows, inner(), outer(), None if weights is None else weights[i])
            for i, (inner, outer) in enumerate(zip(inners, outers, strict=True))
        ]
    )
    return SharedDecomposition(Decomposition(captured.sum(0).flip(0), rows.flip(1)), captured)


def truncate_shared(
    weights: Sequence[Tensor],
    found: Decomposition,
    rank: int,
    dtype: torch.dtype,
    inners: Sequence[Callable[[], Tensor]],
) -> SharedFactors:
    """The factors of a group at one rank, every component shared evenly between A and the stack of the B_i.

    A is rounded to the storage type first; the B_i are fitted to the rounded one.

    Args:
        weights: W_i, [m_i, n].
        found: of :func:`decompose_shared`.
        rank: 1 <= rank <= min(sum m_i, n).
        dtype: storage type.
        inners: loads R_i of each layer; each is loaded twice.

    Raises:
        InputError: the factors do not fit the storage type.
    """
    rows = found.basis[:, -rank:].flip(1)
    if not bool(rows.any()):  # nothing was seen of any of them
        return plain_shared(weights, None, rank, dtype, Workspace())
    inners = [partial(_seen, inner, inners) for inner in inners]
    squares = torch.zeros(rank, dtype=rows.dtype, device=rows.device)
    for weight, inner in zip(weights, inners, strict=True):
        squares += _partner(weight, rows, inner()).square().sum(0)
    lengths = squares.sqrt() * _inverse(torch.linalg.vector_norm(rows, dim=0))
    # a row without any length is zero, and what would be divided by it is zero too
    scales = torch.where(lengths > 0, lengths, 1).sqrt()
    small = (rows * scales).to(dtype)
    refuse_overflowing_factor(small)
    stored = small.to(rows.dtype) / scales
    ups = []
    for weight, inner in zip(weights, inners, strict=True):
        up = (_partner(weight, stored, inner()) / scales).to(dtype)
        refuse_overflowing_factor(up)
        ups.append(up)
    down = small.T.contiguous()
    errors = [relative_error(weight, up, down) for weight, up in zip(weights, ups, strict=True)]
    return SharedFactors(down, ups, errors, str(rows.dtype)[6:])


def plain_shared(
    weights: Sequence[Tensor], found: Decomposition | None, rank: int, dtype: torch.dtype, work: Workspace
) -> SharedFactors:
    """The factors of a group without metrics: those of the stack.

    Args:
        weights: W_i, [m_i, n].
        found: decomposition of the stack, or None to compute what is needed of it.
        rank, dtype, work: see :func:`svdconvert.linalg.exact.factorize`.

    Raises:
        InputError: a matrix has NaN or infinite entries, or the factors do not fit the storage type.
    """
    for weight in weights:  # the stack would hide one whose squares are too small
        check_entries(weight)
    stack = torch.cat(list(weights))
    factors = factorize(stack, rank, dtype, work) if found is None else truncate(stack, found, rank, dtype, work)
    ups = [part.contiguous() for part in factors.up.split([weight.shape[0] for weight in weights])]
    errors = [relative_error(weight, up, factors.down) for weight, up in zip(weights, ups, strict=True)]
    return SharedFactors(factors.down, ups, errors, factors.precision)


def _seen(inner: Callable[[], Tensor], others: Sequence[Callable[[], Tensor]]) -> Tensor:
    """A layer's metric, or the mean of all where the text has shown it nothing but zeros."""
    own = inner()
    return own if bool(own.any()) else _sum(other() / len(others) for other in others)


def _partner(weight: Tensor, rows: Tensor, inner: Tensor) -> Tensor:
    """A layer's partner of A in its own metric, [m, r], for the rows of A as columns, [n, r]."""
    solved = pseudo_inverse(rows, apply_metric(inner, rows), RIDGE)
    return partner(Scaled(weight, 1.0, Workspace(), by_rows=True), solved)


def _captured(rows: Tensor, inner: Tensor, outer: Metric, weight: Tensor | None) -> Tensor:
    """[k]: what each row of A, in descending order, adds to what one layer captures by its partners.

    With A R A^T + ridge = C C^T, N = C^-1 Q C^-T and H = C^-1 C^-T, the partner of the leading rows captures
    tr(N) + ridge tr(N H) of the leading blocks. The ridge is that of the partners, far above what rounding leaves of
    rows that the layer has not seen; without it, N is there the quotient of two rounding errors. What no partner
    captures is counted with the last row, so that all add up to tr(L W R W^T).
    """
    seen = apply_metric(inner, rows)  # [n, k]
    if weight is None:
        assert outer is not None
        gain = seen.T @ apply_metric(outer, seen)
        whole = (outer * inner).sum() if inner.dim() == 2 else outer.diagonal() @ inner
    else:
        exact = weight.double()
        outputs = exact @ seen
        gain = outputs.T @ apply_metric(outer, outputs)
        whole = (apply_metric(inner, exact.T).T * apply_metric(outer, exact)).sum()
    overlap = rows.T @ seen
    overlap.diagonal().add_(RIDGE)
    root = torch.linalg.cholesky(overlap)
    half = torch.linalg.solve_triangular(root, gain, upper=False)
    caught = torch.linalg.solve_triangular(root, half.T, upper=False)
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    pairs = caught * (inverse @ inverse.T)
    gains = caught.diagonal() + RIDGE * (2 * pairs.tril(-1).sum(dim=1) + pairs.diagonal())
    gains = gains.clamp_min(0)
    gains[-1] += (whole - gains.sum()).clamp_min(0)
    return gains


def _inverse(values: Tensor) -> Tensor:
    """1 / v, and 0 for what is no more than rounding beside the largest."""
    least = values.max() * values.numel() * torch.finfo(values.dtype).eps
    return torch.where(values > least, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0)


def _matrix(outer: Metric) -> Tensor:
    assert outer is not None
    return outer


def _sum(terms: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for term in terms:
        total = term.clone() if total is None else total.add_(term)
    assert total is not None
    return total


def _blocks(metrics: Sequence[Metric]) -> Metric:
    """Metrics of one kind as the blocks of one."""
    known = [metric for metric in metrics if metric is not None]
    if not known:
        return None
    assert len(known) == len(metrics)
    return torch.block_diag(*known) if known[0].dim() == 2 else torch.cat(known)
