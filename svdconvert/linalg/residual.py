"""How far a product is from its matrix: norms of what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.products import product

# Rows that are compared at a time: in float64, four pieces of so many are there.
PANEL = 256


def relative(squared: float, total: float) -> float:
    """The root of a part of a sum of squares over the whole; 0 of nothing."""
    return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0


def relative_error(weight: Tensor, up: Tensor, down: Tensor, inner: Metric = None) -> float:
    """||(W - up @ down) R^1/2||_F / ||W R^1/2||_F in float64, a block of rows at a time; 0 where there is no W.

    Args:
        weight, up, down: [m, n], [m, r] and [r, n], any floating type.
        inner: R, [n, n] or its diagonal; None for the identity.
    """
    return relative(*squared_errors(weight, up, down, inner))


def squared_errors(weight: Tensor, up: Tensor, down: Tensor, inner: Metric = None) -> tuple[float, float]:
    """``(||(W - up @ down) R^1/2||^2, ||W R^1/2||^2)``, as of :func:`relative_error`."""
    narrow = down.double()
    return _squared(weight, lambda part: product(up[part].double(), narrow), inner)


def relative_difference(weight: Tensor, other: Tensor) -> float:
    """:func:`relative_error` of a product that has been multiplied out: [m, n], any floating type."""
    return relative(*_squared(weight, lambda part: other[part].double(), None))


def _squared(weight: Tensor, rows: Callable[[slice], Tensor], inner: Metric) -> tuple[float, float]:
    left = energy = 0.0

    def square(of: Tensor) -> float:
        return float((of * apply_metric(inner, of.T).T).sum())

    for start in range(0, weight.shape[0], PANEL):
        part = slice(start, start + PANEL)
        exact = weight[part].double()
        left += square(exact - rows(part))
        energy += square(exact)
    return left, energy


def residual_of(weight: Tensor, down: Tensor, up: Tensor) -> float:
    """||W - up down||^2 in the Frobenius norm, formed explicitly in float32, of factors as they are stored."""
    matrix = Scaled(weight, 1.0, Workspace())
    small, large = (down.T, up) if matrix.tall else (up, down)
    return residual(matrix, small.float(), large, 1.0)[0]


def residual(matrix: Scaled, small: Tensor, large: Tensor, half: float) -> tuple[float, float]:
    """``(||W - product||^2, ||W||^2)`` in the Frobenius norm, formed explicitly.

    Args:
        matrix: W.
        small: the factor on the smaller side, scaled.
        large: the other one as it is stored.
        half: what `large` has to be multiplied with.
    """
    left = energy = 0.0
    for part, piece in matrix.panels(small.dtype):
        piece_of_large = (large[part] if matrix.tall else large[:, part]).to(small.dtype) * half
        made = product(piece_of_large, small.T) if matrix.tall else product(small, piece_of_large)
        left += float(torch.linalg.vector_norm(piece - made)) ** 2
        energy += float(torch.linalg.vector_norm(piece)) ** 2
    return left, energy


def left_over(matrix: Scaled, basis: Tensor) -> float:
    """||W - W V V^T||^2 for orthonormal columns V on the smaller side, [k, r], formed explicitly."""
    rest = 0.0
    for _, piece in matrix.panels(basis.dtype):
        rows = piece if matrix.tall else piece.T
        rest += float(torch.linalg.vector_norm(rows - (rows @ basis) @ basis.T)) ** 2
    return rest
