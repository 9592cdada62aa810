"""What a layout is: the tensors that stand for a product of rank r, what they cost, and how they are made and read.

The first half of :class:`Layout` is about names and shapes and needs no torch. The second half are the verbs on
tensors; they import torch when they are called. A layout has to define ``name``, ``bias``, ``rank_axis``,
:meth:`Layout.weights`, :meth:`Layout.outer_shape`, :meth:`Layout.factors` and :meth:`Layout.store`; all other verbs
follow from these, and a layout defines those that it can do better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from svdconvert.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdconvert.linalg.metrics import Metric
    from svdconvert.linalg.results import Factors, Truncation

Shape = tuple[int, int]


class Layout(ABC):
    """A way to store a product of rank r and shape ``(out, in)``.

    Attributes:
        name: as on the command line and in config.json's ``svd_layout``.
        bias: suffix of the bias.
        rank_axis: suffix of a weight -> the axis that is as long as the rank.
        two_factors: whether it stores two factors as they are, the input-side one first. Layers can then share that
            one, and factors that were rounded elsewhere can be stored.
        index_rule: what the values of an index tensor must be, for messages.
    """

    name: ClassVar[str]
    bias: ClassVar[str]
    rank_axis: ClassVar[Mapping[str, int]]
    two_factors: ClassVar[bool] = False
    index_rule: ClassVar[str] = ""

    # Names, shapes and costs.

    @abstractmethod
    def weights(self, rank: int, shape: Shape) -> Mapping[str, tuple[int, ...]]:
        """Suffix of each weight's name -> its shape; the input-side factor comes first."""

    def indices(self, shape: Shape) -> Mapping[str, tuple[int, ...]]:
        """Suffix of each int64 tensor beside the weights -> its shape."""
        return {}

    @abstractmethod
    def outer_shape(self, stored: Sequence[TensorInfo]) -> Shape:
        """``(out, in)`` of the dense matrix that stored tensors stand for; they come in the order of :meth:`names`."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of all its tensors: the weights, then the indices."""
        return (*self.weights(1, (2, 2)), *self.indices((2, 2)))

    def cost(self, rank: int, shape: Shape) -> int:
        """Parameters stored; indices are no parameters."""
        return sum(math.prod(weight) for weight in self.weights(rank, shape).values())

    def rank_limit(self, shape: Shape) -> int:
        """The highest rank that it can store."""
        return min(shape)

    def break_even(self, shape: Shape) -> float:
        """The rank from which on nothing is saved."""
        return self.highest_rank(shape, shape[0] * shape[1] - 1) + 1.0

    def highest_rank(self, shape: Shape, params: float) -> int:
        """The highest rank that costs at most ``params`` parameters; 0 if there is none."""
        low, high = 0, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost(middle, shape) <= params else (low, middle - 1)
        return low

    def names(self, weight: str) -> tuple[str, ...]:
        """Names of the tensors that take the place of one dense weight, in the order of :attr:`suffixes`."""
        stem = weight.removesuffix("weight")
        return tuple(stem + suffix for suffix in self.suffixes)

    def bias_name(self, bias: str) -> str:
        """Name of a factored layer's bias."""
        return bias.removesuffix("bias") + self.bias

    def tensors(self, weight: str, rank: int, shape: Shape, dtype: str) -> tuple[TensorInfo, ...]:
        """The tensors that take the place of one dense weight, in the order of :meth:`names`.

        Args:
            weight: name of the dense weight.
            rank: of the product.
            shape: ``(out, in)`` of the dense weight.
            dtype: safetensors' code of the weights' type.
        """
        sizes = [(dtype, size) for size in self.weights(rank, shape).values()]
        sizes += [("I64", size) for size in self.indices(shape).values()]
        return tuple(TensorInfo(name, code, size) for name, (code, size) in zip(self.names(weight), sizes, strict=True))

    @property
    def rank_axes(self) -> list[tuple[int, int]]:
        """``(place in the order of the names, axis of the rank)`` of each weight that has one."""
        places = {suffix: place for place, suffix in enumerate(self.suffixes)}
        return [(places[suffix], axis) for suffix, axis in self.rank_axis.items()]

    # Verbs on tensors. All take and give them in the order of `names`.

    @abstractmethod
    def factors(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``(up [m, r], down [r, n])`` whose product the stored tensors stand for, in any floating type."""

    @abstractmethod
    def store(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The tensors of a product, rounded to a storage type.

        Args:
            up, down: [m, r] and [r, n], any floating type; r is at most :meth:`rank_limit`.
            dtype: of the weights.
        """

    def product(self, stored: Sequence[Tensor]) -> Tensor:
        """The matrix that stored tensors stand for: [m, n] float64."""
        up, down = self.factors(stored)
        from svdconvert.linalg.products import product

        return product(up.double(), down.double())

    def dense(self, stored: Sequence[Tensor]) -> Tensor:
        """The matrix that takes the place of stored tensors in a dense checkpoint: [m, n], float32 or float64."""
        return self.product(stored)

    def fit(self, up: Tensor, down: Tensor, wanted: Tensor, right: Metric, dtype: torch.dtype) -> list[Tensor]:
        """:meth:`store`, where something is known of what the product is for.

        Args:
            up, down, dtype: see :meth:`store`.
            wanted: the matrix that the product is to be near to, [m, n].
            right: metric on the inputs in which it is to be near, see :data:`svdconvert.linalg.metrics.Metric`.
        """
        return self.store(up, down, dtype)

    def refit(self, stored: Sequence[Tensor], up: Tensor, gram: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Stored tensors with another output-side factor.

        Args:
            stored: the tensors as they are.
            up: takes the place of the first of their :meth:`factors`, [m, r] float64.
            gram: second moments of what the input-side factor gives, [r, r] float64: the metric to round in.
            dtype: of the weights.
        """
        return self.store(up, self.factors(stored)[1].double(), dtype)

    def truncate(
        self, weight: Tensor, solve: Callable[[torch.dtype], Factors], dtype: torch.dtype, left: Metric, right: Metric
    ) -> Truncation:
        """Truncate a matrix into this layout.

        The factors are found in float64, and rounding starts from those.

        Args:
            weight: [m, n], any floating type.
            solve: a type -> the best two factors in it, in the metrics.
            dtype: of the weights.
            left, right: metrics on the outputs and the inputs. Of the one on the longer side the diagonal is enough.

        Raises:
            InputError: the matrix has NaN or infinite entries, or the factors do not fit the storage type.
        """
        import torch

        from svdconvert.linalg.metrics import apply_metric
        from svdconvert.linalg.products import product
        from svdconvert.linalg.residual import relative_difference
        from svdconvert.linalg.results import Truncation

        factors = solve(torch.float64)
        exact = product(factors.up, factors.down)
        if right is not None and not bool(right.any()):  # it was left out of the truncation too
            right = None
        # Where only the diagonal of the inputs' metric is known, that the truncation is the best one is not to be seen
        # in it; but what rounding has changed is.
        wanted = weight if weight.shape[0] >= weight.shape[1] else exact
        stored = self.fit(factors.up, factors.down, wanted, right, dtype)
        made = self.product(stored)
        error = relative_difference(weight, made)
        lost = exact - made
        added = float((apply_metric(left, apply_metric(right, lost.T).T) * lost).sum())
        plain = left is None and right is None
        return Truncation(
            tensors=stored,
            relative_error=error,
            # Without metrics both are errors of the weights, and only their last digits can be the other way round.
            optimal_error=min(factors.optimal_error, error) if plain else factors.optimal_error,
            rounding_excess=added / factors.metric_loss if factors.metric_loss > 0 else None,
            basis=None,
            precision=factors.precision,
            certificate=factors.certificate,
        )

    def sound(self, index: Tensor) -> bool:
        """Whether the values of an index tensor are what :attr:`index_rule` says, whatever its type is."""
        return True
