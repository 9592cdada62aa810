"""``pivoted``: r rows of the product and the coefficients of the others, r (m + n - r) numbers.

The mathematics is in ``linalg/pivot.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from svdconvert.layouts.row import Layout, Shape
from svdconvert.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdconvert.linalg.metrics import Metric


class Pivoted(Layout):
    """W = [down; up @ down][position]: ``down`` are rows of W, ``position`` says where each output is."""

    name = "pivoted"
    bias = "bias"
    rank_axis: ClassVar[Mapping[str, int]] = {"down.weight": 0, "up.weight": 1}
    index_rule = "permutation of its layer's outputs"

    def weights(self, rank: int, shape: Shape) -> Mapping[str, Shape]:
        return {"down.weight": (rank, shape[1]), "up.weight": (shape[0] - rank, rank)}

    def indices(self, shape: Shape) -> Mapping[str, tuple[int, ...]]:
        return {"position": (shape[0],)}

    def outer_shape(self, stored: Sequence[TensorInfo]) -> Shape:
        down, _, position = stored
        return position.shape[0], down.shape[1]

    def rank_limit(self, shape: Shape) -> int:
        """One row at least is left to compute."""
        return min(shape[0] - 1, shape[1])

    def break_even(self, shape: Shape) -> float:
        return float(min(shape))

    def factors(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        from svdconvert.linalg.pivot import full_up

        down, up, position = stored
        return full_up(up, position), down

    def store(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The rows are chosen anew."""
        from svdconvert.linalg.pivot import pivot

        return list(pivot(up, down, dtype))

    def product(self, stored: Sequence[Tensor]) -> Tensor:
        from svdconvert.linalg.pivot import product

        return product(*stored)

    def fit(self, up: Tensor, down: Tensor, wanted: Tensor, right: Metric, dtype: torch.dtype) -> list[Tensor]:
        """The coefficients are fitted to the rows as they are stored."""
        from svdconvert.linalg.pivot import pivot, rounded_coefficients

        rows, _, position = pivot(up, down, dtype)
        span = int((up.any(dim=0) & down.any(dim=1)).sum())
        return [rows, rounded_coefficients(wanted, rows, position, right, dtype, span), position]

    def sound(self, index: Tensor) -> bool:
        import torch

        values = index.flatten()
        return not values.is_floating_point() and torch.equal(values.long().sort().values, torch.arange(len(values)))
