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


def directions(found: Decomposition, inner: Metric, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The directions ``start`` to ``stop - 1`` of a matrix, for :func:`direction_terms`.

    Args:
        found: decomposition of the matrix, with all its vectors.
        inner: the metric on the smaller side.
        start, stop: 0 is the direction of the largest singular value.

    Returns:
        ``(b, M b / (b^T M b))``, [smaller side, stop - start] each, float64; the latter is 0 for directions that the
        metric does not see.
    """
    last = found.basis.shape[1]
    columns = found.basis[:, last - stop : last - start].flip(1).double()
    weighted = apply_metric(inner, columns)
    norms = (columns * weighted).sum(0)
    return columns, torch.where(norms > 0, weighted / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)


def shared_directions(rows: Tensor, inner: Metric, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The same of one layer of a group.

    Args:
        rows: [n, k], the rows of A in descending order.
        inner: the metric on the layer's inputs; None for groups without metrics, whose rows are orthogonal.
        start, stop: see :func:`directions`.
    """
    leading = rows[:, :stop].double()
    if inner is None:
        norms = torch.linalg.vector_norm(leading, dim=0)
        own = leading / torch.where(norms > 0, norms, 1)
    else:
        overlap = leading.T @ apply_metric(inner, leading)
        overlap.diagonal().add_(RIDGE)
        own = torch.linalg.solve_triangular(torch.linalg.cholesky(overlap), leading.T, upper=False).T
    own = own[:, start:].contiguous()
    return own, apply_metric(inner, own)


def direction_terms(weight: Tensor, gradient: Tensor, columns: Tensor, weighted: Tensor) -> Tensor:
    """<gradient, A_i> of directions of a matrix.

    Args:
        weight, gradient: [m, n], any floating type.
        columns, weighted: from :func:`directions`, or from :func:`shared_directions` for a layer of a group.

    Returns:
        [directions] float64.
    """
    weight, gradient = weight.double(), gradient.double()
    if weight.shape[1] != columns.shape[0]:  # a wide one, whose vectors are on the side of the outputs
        weight, gradient = weight.T, gradient.T
    return ((weight @ weighted) * (gradient @ columns)).sum(0)
