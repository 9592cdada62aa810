"""Matrices and products of rank r on integer grids, with as little loss tr(L E R E^T) as rounding allows.

A matrix is rounded with feedback in R. Of a product, the input-side factor is rounded first, with feedback in R as
well; then the other one solves the normal equations for the rounded one, A', and is rounded with feedback in A' R A'^T.
So it makes up for whatever of the first one's errors lies in the space that A' spans.

Feedback along the outputs, in L, would lower this loss by another quarter: entry by entry in the metric L (x) R, later
rows moving by -L_rr^-1 L_rb times the errors of the rows before. It was built and measured, and raised the real one:
SmolLM2's KL at 3 and 4 bits went up by 16 and 33 %. Errors that make up for each other among outputs rely on all of L,
which is of all tokens together; those of a row by itself do not. So L only judges.

A row of the input-side factor has scales of its own, so that its size plays no part; the columns of the other factor
share scales with their neighbours, and are brought to one size. Beside the singular vectors another basis of the
product is tried, in which feedback makes the second factor's error nearly independent of large singular values
(``linalg/rounding.py``). What loses least is taken. Rows of a matrix and the coefficients of the others, the pivoted
layout, have no freedom of that kind: at 4 and 6 bits they mostly lost 2 to 10 times what the dense matrix loses, two
factors 0.4 to 2 times (SmolLM2, twelve matrices), so they are not rounded.

Entries are rounded in float32; Gram matrices, least squares and losses are float64, in which what feedback has
cancelled is still to be seen beside massive channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.grids import Grid
from svdconvert.linalg.feedback import Feedback
from svdconvert.linalg.integers import Rounded, nearest
from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.pivot import fitted
from svdconvert.linalg.results import SINGULAR
from svdconvert.linalg.rounding import equalized


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix on integer grids, by itself or as a product.

    Attributes:
        weights: the matrix; or two factors, the input-side one first.
        loss: tr(L E R E^T) of what is stored, E = W - what is stored.
        way: the basis.
    """

    weights: tuple[Rounded, ...]
    loss: float
    way: str

    def product(self) -> Tensor:
        """What is stored: [m, n] float64."""
        first, *rest = (weight.values(torch.float64) for weight in self.weights)
        return rest[0] @ first if rest else first


class MatrixRounding:
    """All ways to round one matrix in a pair of metrics: what the grids and ranks have in common is computed once."""

    def __init__(
        self,
        weight: Tensor,
        left: Metric,
        right: Metric,
        dtype: torch.dtype,
        feedback: Feedback | None = None,
        sweeps: int = 0,
    ) -> None:
        """Prepare.

        Args:
            weight: [m, n], any floating type.
            left: metric on the outputs. It judges, and chooses between candidates; its diagonal will do.
            right: metric on the inputs, [n, n]; with its diagonal alone, or None, there is nothing to feed back.
            dtype: type that scales are stored in.
            feedback: in ``right``, where another matrix that reads the same inputs has it already.
            sweeps: of coordinate descent after every feedback.
        """
        self.given, self.weight = weight, weight.double()
        self.left, self.right, self.dtype, self.sweeps = left, right, dtype, sweeps
        if feedback is None and right is not None and right.dim() == 2:
            feedback = Feedback(right)
        self.feedback = feedback

    def dense(self, grid: Grid) -> RoundedMatrix:
        """The matrix on a grid.

        Raises:
            InputError: see :func:`svdconvert.linalg.integers.nearest`.
        """
        rounded = self._inputs_side(self.given, grid)
        return RoundedMatrix((rounded,), self.loss(rounded.values(torch.float64)), SINGULAR)

    def balanced(self, up: Tensor, down: Tensor, grids: tuple[Grid, Grid]) -> RoundedMatrix:
        """A product as two factors.

        Args:
            up, down: [m, r] and [r, n], as a truncation to float64 gives them: the singular values shared evenly.
            grids: of ``down`` and of ``up``; the group of the latter divides r.

        Raises:
            InputError: see :func:`svdconvert.linalg.integers.nearest`.
        """
        return min(self._balanced(up.double(), down.double(), grids), key=lambda found: found.loss)

    def loss(self, product: Tensor) -> float:
        """tr(L E R E^T) of a matrix that takes the place of this one, [m, n] float64."""
        error = product - self.weight
        return float((apply_metric(self.left, error) * apply_metric(self.right, error.T).T).sum())

    def _balanced(self, up: Tensor, down: Tensor, grids: tuple[Grid, Grid]) -> Iterator[RoundedMatrix]:
        values = (apply_metric(self.right, down.T).T * down).sum(dim=1).clamp_min(0)  # singular values
        yield self._product(SINGULAR, *_one_size(up, down), grids)
        # Mixed with others, components that the metric does not see would leave rows that depend on each other in it,
        # and the second factor with coefficients that only the metric is content with.
        seen = values > float(values.max()) * 1e-12
        if int(seen.sum()) > 1:
            roots = values[seen].sqrt()
            x, y = equalized(values[seen])
            mixed, rows = torch.zeros_like(up), torch.zeros_like(down)
            mixed[:, seen], rows[seen] = (up[:, seen] / roots) @ x, y.T @ (down[seen] / roots[:, None])
            yield self._product("equalized", *_one_size(mixed, rows), grids)

    def _product(self, way: str, up: Tensor, down: Tensor, grids: tuple[Grid, Grid]) -> RoundedMatrix:
        first = self._inputs_side(down.float(), grids[0])
        wanted, gram = fitted(self.weight, first.values(torch.float64), self.right)
        second = Feedback(gram).round(wanted.float(), grids[1], self.dtype, self.sweeps)
        product = second.values(torch.float64) @ first.values(torch.float64)
        return RoundedMatrix((first, second), self.loss(product), way)

    def _inputs_side(self, rows: Tensor, grid: Grid) -> Rounded:
        """Rows of what the inputs meet."""
        if self.feedback is not None:
            return self.feedback.round(rows, grid, self.dtype, self.sweeps)
        return nearest(rows, grid, self.dtype, self._diagonal())

    def _diagonal(self) -> Tensor | None:
        return self.right.diagonal() if self.right is not None and self.right.dim() == 2 else self.right


def _one_size(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of ``up`` of one size, and both factors alike in theirs."""
    norms = torch.linalg.vector_norm(up, dim=0)
    norms = torch.where(norms > 0, norms, 1)
    up, down = up / norms, down * norms[:, None]
    size = torch.linalg.vector_norm(down) / torch.linalg.vector_norm(up).clamp_min(torch.finfo(up.dtype).tiny)
    root = torch.where(size > 0, size, 1).sqrt()
    return up * root, down / root
