"""``balanced``: two factors that share every singular value evenly, r (m + n) numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from svdconvert.layouts.row import Layout, Shape
from svdconvert.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdconvert.linalg.metrics import Metric
    from svdconvert.linalg.results import Factors, Truncation


class Balanced(Layout):
    """W = up @ down."""

    name = "balanced"
    bias = "up.bias"
    rank_axis: ClassVar[Mapping[str, int]] = {"down.weight": 0, "up.weight": 1}
    two_factors = True

    def weights(self, rank: int, shape: Shape) -> Mapping[str, Shape]:
        return {"down.weight": (rank, shape[1]), "up.weight": (shape[0], rank)}

    def outer_shape(self, stored: Sequence[TensorInfo]) -> Shape:
        down, up = stored
        return up.shape[0], down.shape[1]

    def break_even(self, shape: Shape) -> float:
        m, n = shape
        return m * n / (m + n)

    def factors(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        down, up = stored
        return up, down

    def store(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [down.to(dtype), up.to(dtype)]

    def dense(self, stored: Sequence[Tensor]) -> Tensor:
        """[m, n] float32."""
        down, up = stored
        return up.float() @ down.float()

    def refit(self, stored: Sequence[Tensor], up: Tensor, gram: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The input-side factor stays to the bit."""
        from svdconvert.linalg.rounding import round_with_feedback

        return [stored[0], round_with_feedback(up, gram, dtype) if dtype.itemsize < 4 else up.to(dtype)]

    def truncate(
        self, weight: Tensor, solve: Callable[[torch.dtype], Factors], dtype: torch.dtype, left: Metric, right: Metric
    ) -> Truncation:
        """The solver's own factors, which it rounds with regard to each other."""
        from svdconvert.linalg.results import Truncation

        factors = solve(dtype)
        return Truncation.of_factors(factors, [factors.down, factors.up])
