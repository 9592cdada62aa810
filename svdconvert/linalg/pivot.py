"""The pivoted layout: a product as rows of itself and the coefficients of the others.

Any r independent rows of a rank-r matrix span all of them, so that W = P [I; T] W_rows with a permutation P (as in
PIFA, Zhao et al., ICML 2025): r (m + n - r) numbers, and nothing lost but rounding. That grows with the entries of T;
so the rows are chosen such that none of them is much above 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.products import product as multiplied
from svdconvert.linalg.products import solve_by_root
from svdconvert.linalg.rates import has_slow_float64
from svdconvert.linalg.rounding import round_with_feedback

# No coefficient is left above this. At 1 the choice would be a local maximum of the rows' volume; a little more saves
# most of the exchanges.
LARGEST_COEFFICIENT = 1.1


def pivot(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite a product in the pivoted layout.

    The rows are r outputs of nearly largest volume (Goreinov et al., "How to find a good submatrix", 2010): LU with
    partial pivoting to begin with, then exchanges until every coefficient is small.

    They are rounded to the nearest. Feedback in the metric of the inputs would spare their own outputs something, but
    move what they span further, on which all others depend: with the coefficients refitted, the loss that rounding
    adds came out between 0.7 and 2 times as large.

    Where components are zeros in a factor, the rows that are not needed for the span are outputs like any others, and
    no other output depends on them.

    Args:
        up: [m, r], m > r.
        down: [r, n].
        dtype: storage type.

    Returns:
        ``(rows [r, n], coefficients [m - r, r], position [m] int64)``: output i of the product is element
        position[i] of [rows; coefficients @ rows].
    """
    # An orthonormal basis of the same outputs: well conditioned whatever the singular values, and of full rank even
    # where the product is not.
    rank, used = up.shape[1], up.any(dim=0) & down.any(dim=1)
    if not bool(used.all()):
        up, down = up[:, used], down[used]
    # Rows are told apart by float32 as well; what they hold is computed all the same.
    single = has_slow_float64(up.device)
    exact, triangle = torch.linalg.qr(up.float() if single else up.double())
    span = exact.shape[1]
    order = _independent_rows(exact)
    coefficients = torch.linalg.solve(exact[order[:span]], exact[order[span:]], left=False)
    _exchange(coefficients, order, span)
    chosen = order[:rank]
    whole = multiplied(up.double()[chosen], down.double()) if single else exact[chosen] @ (triangle @ down.double())
    rows = whole.to(dtype)
    # The same coefficients from scratch: many exchanges would pile up rounding.
    coefficients = torch.linalg.solve(exact[order[:span]], exact[order[rank:]], left=False)
    coefficients = torch.nn.functional.pad(coefficients, (0, rank - span))
    return rows, coefficients.to(dtype), torch.argsort(order).to(rows.device)


def rounded_coefficients(
    weight: Tensor, rows: Tensor, position: Tensor, right: Metric, dtype: torch.dtype, span: int | None = None
) -> Tensor:
    """The coefficients that fit a matrix best, given the rows as they are stored.

    Every output is a least-squares problem of its own, so that the metric on the outputs plays no part. To 16 bits they
    are rounded with feedback, as rows that were chosen are far from orthogonal and their coefficients can make up for
    each other.

    Args:
        weight: [m, n], the matrix that is approximated.
        rows: [r, n], rounded.
        position: [m].
        right: metric on the inputs.
        dtype: storage type.
        span: rows that others may depend on, the first ones; the coefficients of the others are zeros. None means all.

    Returns:
        [m - r, r] in ``dtype``.
    """
    rank, others = rows.shape[0], weight[torch.argsort(position)[rows.shape[0] :]]
    found, gram = fitted(others, rows[:span], right)
    rounded = found.to(dtype) if dtype.itemsize > 2 else round_with_feedback(found, gram, dtype)
    return torch.nn.functional.pad(rounded, (0, rank - rounded.shape[1]))


def fitted(others: Tensor, rows: Tensor, right: Metric) -> tuple[Tensor, Tensor]:
    """The least-squares coefficients of outputs, given rows.

    Args:
        others: the outputs, [p, n].
        rows: [r, n]. One that the metric does not see, or that is zeros once stored, gets no coefficient.
        right: metric on the inputs.

    Returns:
        ``(coefficients [p, r], Gram matrix of the rows in the metric [r, r])``, float64.
    """
    exact, others = rows.double(), others.double()
    weighted = apply_metric(right, exact.T)  # [n, r]
    gram = multiplied(exact, weighted)
    norms = gram.diagonal()
    scale = torch.where(norms > 0, norms.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0)
    near = gram * scale[:, None] * scale
    root, failed = torch.linalg.cholesky_ex(near)
    products = multiplied(others, weighted) * scale
    if int(failed):
        return multiplied(products, torch.linalg.pinv(near, hermitian=True)) * scale, gram
    return solve_by_root(root, products.T).T * scale, gram


def product(rows: Tensor, coefficients: Tensor, position: Tensor) -> Tensor:
    """The matrix that a pivoted triple stands for: [m, n] float64."""
    exact = rows.double()
    return torch.cat([exact, multiplied(coefficients.double(), exact)])[position]


def full_up(coefficients: Tensor, position: Tensor) -> Tensor:
    """The coefficients of all outputs, those of the stored rows included: [m, r] float64."""
    rank = coefficients.shape[1]
    identity = torch.eye(rank, dtype=torch.float64, device=coefficients.device)
    return torch.cat([identity, coefficients.double()])[position]


def _independent_rows(matrix: Tensor) -> Tensor:
    """The row order of an LU decomposition with partial pivoting: [m] int64, on the CPU."""
    _, pivots = torch.linalg.lu_factor(matrix)
    order = list(range(matrix.shape[0]))
    for i, j in enumerate((pivots - 1).cpu().tolist()):
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order)


def _exchange(coefficients: Tensor, order: Tensor, rank: int) -> None:
    """Exchange a chosen row against another while a coefficient exceeds the bound; both arguments are updated.

    The order is one of the host's, where every exchange is decided.

    Every exchange multiplies the volume of the chosen rows by that coefficient, so that it ends.
    """
    while coefficients.numel():
        i, j = divmod(int(coefficients.abs().argmax()), rank)
        value = float(coefficients[i, j])
        if abs(value) <= LARGEST_COEFFICIENT:
            return
        # Output i takes the place of chosen output j (Sherman-Morrison for the inverse).
        row = coefficients[i].clone()
        column = coefficients[:, j].clone()
        row[j] -= 1
        column[i] += 1
        coefficients.addr_(column, row, alpha=-1 / value)
        order[[j, rank + i]] = order[[rank + i, j]]
