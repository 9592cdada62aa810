"""What the directions of a decomposition do to a function of the matrix: inner products with its gradient.

In the order in which a truncation keeps them, direction i is what rank i + 1 adds to the product of rank i, a matrix
A_i of rank one. With the decomposition of ``linalg/exact.py`` and b the i-th vector on the smaller side, M the metric
there, A_i = (W M b) b^T / (b^T M b) for a tall matrix, and b (W^T M b)^T / (b^T M b) for a wide one. Layers that share
a factor each have partners in their own metric, in which the rows of A are not orthogonal; the Cholesky factor of
A R A^T makes them so, one after the other, and the products stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.results import Decomposition
from svdconvert.linalg.shared import RIDGE


def direction_terms(
    weight: Tensor, gradient: Tensor, found: Decomposition, inner: Metric, start: int, stop: int
) -> Tensor:
    """<gradient, A_i> of the directions ``start`` to ``stop - 1`` of a matrix.

    Args:
        weight, gradient: [m, n], any floating type.
        found: decomposition of the matrix, with all its vectors.
        inner: the metric on the smaller side.
        start, stop: 0 is the direction of the largest singular value.

    Returns:
        [stop - start] float64; 0 for directions that the metric does not see.
    """
    last = found.basis.shape[1]
    columns = found.basis[:, last - stop : last - start].flip(1).double()
    weighted = apply_metric(inner, columns)
    norms = (columns * weighted).sum(0)
    weight, gradient = weight.double(), gradient.double()
    if weight.shape[0] < weight.shape[1]:
        weight, gradient = weight.T, gradient.T
    terms = ((weight @ weighted) * (gradient @ columns)).sum(0)
    return torch.where(norms > 0, terms / norms.clamp_min(torch.finfo(terms.dtype).tiny), 0)


def shared_terms(weight: Tensor, gradient: Tensor, rows: Tensor, inner: Metric, start: int, stop: int) -> Tensor:
    """The same of one layer of a group.

    Args:
        weight, gradient: [m, n] of the layer, any floating type.
        rows: [n, k], the rows of A in descending order.
        inner: the metric on the layer's inputs; None for groups without metrics, whose rows are orthogonal.
        start, stop: see :func:`direction_terms`.
    """
    leading = rows[:, :stop].double()
    if inner is None:
        norms = torch.linalg.vector_norm(leading, dim=0)
        own = leading / torch.where(norms > 0, norms, 1)
    else:
        overlap = leading.T @ apply_metric(inner, leading)
        overlap.diagonal().add_(RIDGE)
        own = torch.linalg.solve_triangular(torch.linalg.cholesky(overlap), leading.T, upper=False).T
    own = own[:, start:]
    return ((weight.double() @ apply_metric(inner, own)) * (gradient.double() @ own)).sum(0)
