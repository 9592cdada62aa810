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

Without metrics the stack is one matrix to ``linalg/exact.py``. Of a tall one the Gram matrix is summed up layer by
layer, and with its rows known each B_i needs its own W_i alone. So the stack is never there as a whole, nor are the
B_i: weights are asked for one after the other, once for the sums and once for the factors, and a layer's factor is made
when it is asked for. A wide stack is no larger than the Gram matrix of its other side, and is put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from svdconvert.linalg.exact import decompose, decompose_gram, decompose_plain, factorize, truncate
from svdconvert.linalg.gram import add_gram_matrix
from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import PANEL, Scaled, Workspace
from svdconvert.linalg.partner import partner, pseudo_inverse
from svdconvert.linalg.precision import check_entries, largest_entry, refuse_overflowing_factor, scale_of
from svdconvert.linalg.residual import squared_errors
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
class OwnFactor:
    """What a layer has for itself, B_i.

    Attributes:
        up: [m_i, r].
        loss, energy: ||W_i - up @ down||_F^2 as they are stored, and ||W_i||_F^2.
    """

    up: Tensor
    loss: float
    energy: float


@dataclass(frozen=True)
class SharedFactors:
    """W_i ~ B_i A.

    Attributes:
        down: A, [r, n].
        own: B_i of layer after layer, each made when it is asked for.
        precision: ``float32`` or ``float64``, what the eigenproblem was solved in.
    """

    down: Tensor
    own: Iterator[OwnFactor]
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
    del pooled, found
    work.clear()  # as much again is needed below
    rows = rows.flip(1)
    captured = torch.stack(
        [
            _captured(rows, inner(), outer(), None if weights is None else weights[i])
            for i, (inner, outer) in enumerate(zip(inners, outers, strict=True))
        ]
    )
    return SharedDecomposition(Decomposition(captured.sum(0).flip(0), rows.flip(1)), captured)


def decompose_stack(
    weights: Sequence[Tensor], work: Workspace, *, tall: bool, rank: int | None = None
) -> Decomposition:
    """Decomposition of a group without metrics: that of the stack.

    Args:
        weights: W_i, [m_i, n], each valid until the next is asked for. Those of a tall stack are gone through once;
            once more where their entries are far from 1, and once more where float32 is not enough.
        work: its buffers hold the result until it is used again.
        tall: whether the stack has at least as many rows as columns.
        rank: see :func:`svdconvert.linalg.exact.decompose`.

    Raises:
        InputError: a matrix has NaN or infinite entries.
    """
    if not tall:
        return decompose(torch.cat(_checked(weights)), work, rank=rank)
    first, largest = _plain_gram(weights, 1.0, torch.float32, work)
    scale = scale_of(largest)

    def gram(dtype: torch.dtype) -> Tensor:
        return first if scale == 1 and dtype == first.dtype else _plain_gram(weights, scale, dtype, work)[0]

    return decompose_plain(gram, scale, work, rank)


def truncate_shared(
    weights: Sequence[Tensor],
    found: Decomposition,
    rank: int,
    dtype: torch.dtype,
    inners: Sequence[Callable[[], Tensor]],
    *,
    tall: bool,
) -> SharedFactors:
    """The factors of a group at one rank, every component shared evenly between A and the stack of the B_i.

    A is rounded to the storage type first; the B_i are fitted to the rounded one.

    Args:
        weights: W_i, [m_i, n], each valid until the next is asked for; they are gone through twice.
        found: of :func:`decompose_shared`.
        rank: 1 <= rank <= min(sum m_i, n).
        dtype: storage type.
        inners: loads R_i of each layer; each is loaded twice.
        tall: whether the stack has at least as many rows as columns.

    Raises:
        InputError: the factors do not fit the storage type; so does what iterates over those of the layers.
    """
    rows = found.basis[:, -rank:].flip(1)
    if not bool(rows.any()):  # nothing was seen of any of them
        return plain_shared(weights, None, rank, dtype, Workspace(), tall=tall)
    inners = [partial(_seen, inner, inners) for inner in inners]
    squares = torch.zeros(rank, dtype=rows.dtype, device=rows.device)
    for weight, inner in zip(weights, inners, strict=True):
        squares += _partner(weight, rows, inner()).square().sum(0)
    lengths = squares.sqrt() * _inverse(torch.linalg.vector_norm(rows, dim=0))
    # a row without any length is zero, and what would be divided by it is zero too
    scales = torch.where(lengths > 0, lengths, 1).sqrt()
    small = (rows * scales).to(dtype)
    refuse_overflowing_factor(small)
    stored, down = small.to(rows.dtype) / scales, small.T.contiguous()
    ups = (
        (_partner(weight, stored, inner()) / scales).to(dtype) for weight, inner in zip(weights, inners, strict=True)
    )
    return SharedFactors(down, _own(weights, ups, down), str(rows.dtype)[6:])


def plain_shared(
    weights: Sequence[Tensor],
    found: Decomposition | None,
    rank: int,
    dtype: torch.dtype,
    work: Workspace,
    *,
    tall: bool,
) -> SharedFactors:
    """The factors of a group without metrics: those of the stack.

    Args:
        weights: W_i, [m_i, n], each valid until the next is asked for; they are gone through once, besides what
            :func:`decompose_stack` does.
        found: of :func:`decompose_stack`, or None to compute what is needed of it.
        rank, dtype, work: see :func:`svdconvert.linalg.exact.factorize`; the buffers are in use until the last layer.
        tall: whether the stack has at least as many rows as columns.

    Raises:
        InputError: a matrix has NaN or infinite entries, or the factors do not fit the storage type; so does what
            iterates over those of the layers.
    """
    if not tall:
        parts = _checked(weights)
        stack, heights = torch.cat(parts), [len(part) for part in parts]
        factors = factorize(stack, rank, dtype, work) if found is None else truncate(stack, found, rank, dtype, work)
        ups: Iterator[Tensor] = (part.contiguous() for part in factors.up.split(heights))
        return SharedFactors(factors.down, _own(stack.split(heights), ups, factors.down), factors.precision)
    found = found or decompose_stack(weights, work, tall=True, rank=rank)
    kept = min(rank, found.resolved)
    if not kept:  # they are all zeros
        down = torch.zeros(rank, found.basis.shape[0], dtype=dtype, device=found.basis.device)
        ups = (weight.new_zeros(weight.shape[0], rank, dtype=dtype) for weight in weights)
        return SharedFactors(down, _own(weights, ups, down), found.precision)
    scale, half = found.scale, math.sqrt(found.scale)  # as in `truncate`
    basis = found.basis[:, -kept:].flip(1)
    small = (basis * found.values[-kept:].flip(0).sqrt().to(basis.dtype).sqrt() / half).to(dtype)
    refuse_overflowing_factor(small)
    lifted = small.to(basis.dtype) * half
    solved, more = pseudo_inverse(lifted, lifted) / half, rank - kept
    ups = (pad(partner(Scaled(weight, scale, work, by_rows=True), solved).to(dtype), (0, more)) for weight in weights)
    down = pad(small.T.contiguous(), (0, 0, 0, more))
    return SharedFactors(down, _own(weights, ups, down), found.precision)


def _own(weights: Sequence[Tensor], ups: Iterator[Tensor], down: Tensor) -> Iterator[OwnFactor]:
    """Factors of layer after layer, checked and compared with their weights."""
    for up, weight in zip(ups, weights, strict=True):
        refuse_overflowing_factor(up)
        yield OwnFactor(up, *squared_errors(weight, up, down))


def _checked(weights: Sequence[Tensor]) -> list[Tensor]:
    """Copies of all weights; one whose squares are too small, which the others would hide in the stack, is refused."""
    kept = []
    for weight in weights:
        check_entries(weight)
        kept.append(weight.clone())
    return kept


def _plain_gram(weights: Sequence[Tensor], scale: float, dtype: torch.dtype, work: Workspace) -> tuple[Tensor, float]:
    """Lower triangle of the sum of W_i^T W_i, of the matrices times a scale, and their largest entry without it."""
    gram, largest = None, 0.0
    for weight in weights:
        largest = max(largest, largest_entry(weight))
        if gram is None:
            gram = work.take("gram", (weight.shape[1], weight.shape[1]), dtype, weight.device).zero_()
        add_gram_matrix(gram, Scaled(weight, scale, work, by_rows=True), None)
    assert gram is not None
    return gram, largest


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
    del seen
    root = torch.linalg.cholesky(overlap)
    del overlap
    half = torch.linalg.solve_triangular(root, gain, upper=False)
    del gain
    caught = torch.linalg.solve_triangular(root, half.T, upper=False)
    del half
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    del identity, root
    pairs = (inverse @ inverse.T).mul_(caught)
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
