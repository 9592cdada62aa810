"""What a decomposition and a truncation give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINGULAR = "singular vectors"


@dataclass(frozen=True)
class Factors:
    """A rank-r factorization W ~ up @ down.

    Components that rounding cannot tell from nothing are zeros in both factors, the last ones.

    Attributes:
        down: [r, n], the first linear layer's weight.
        up: [m, r], the second one's.
        relative_error: ||W - up @ down||_F / ||W||_F of the factors as they are stored.
        optimal_error: the relative error, in the metrics, of the best rank-r product; with a certificate the least
            that it can be by that. Components that are not :attr:`Decomposition.resolved` count as nothing in metrics,
            and where the rank is above their number.
        metric_error: the relative error, in the metrics, of the factors as they are stored.
        metric_loss: the square of the same, not relative: tr(L E R E^T) with E = W - up @ down.
        rounding_excess: what the storage type adds to the loss in the metrics, relative to that of the product before
            rounding; None where that one loses nothing.
        basis: ``singular vectors``, or the name of a row of :data:`svdconvert.linalg.rounding.BASES`.
        precision: ``float32`` or ``float64``, what the eigenproblem was solved in.
        certificate: what the error of the product before rounding is estimated to be above the least possible one at
            most, relative to it (``linalg/filtered.py``); None for the best product.
    """

    down: Tensor
    up: Tensor
    relative_error: float
    optimal_error: float
    metric_error: float
    metric_loss: float
    rounding_excess: float | None
    basis: str
    precision: str
    certificate: float | None = None


@dataclass(frozen=True)
class Truncation:
    """A truncation as a layout stores it.

    Attributes:
        tensors: in the order of the layout's names.
        relative_error: ||W - product||_F / ||W||_F of the tensors as they are stored.
        optimal_error, rounding_excess, precision, certificate: see :class:`Factors`.
        basis: likewise; None for layouts that do not store two factors.
    """

    tensors: list[Tensor]
    relative_error: float
    optimal_error: float
    rounding_excess: float | None
    basis: str | None
    precision: str
    certificate: float | None

    @classmethod
    def of_factors(cls, factors: Factors, tensors: list[Tensor]) -> Truncation:
        """Factors that are stored as they are: ``tensors`` are those, wherever they lie by now."""
        return cls(
            tensors,
            factors.relative_error,
            factors.optimal_error,
            factors.rounding_excess,
            factors.basis,
            factors.precision,
            factors.certificate,
        )


@dataclass(frozen=True)
class Decomposition:
    """What a truncation at any rank needs, computed once.

    Attributes:
        values: [k] float64, ascending: squared singular values of L^1/2 W R^1/2, k = min(m, n).
        basis: [k, c], the last column belongs to the last value, and so on: a row of `down` if W is tall, a column of
            `up` if it is wide, up to its length. c is k, or the highest rank that was asked for.
        scale: power of four that the matrix was multiplied with; `values` and `basis` are of the scaled matrix.
        single: whether they were found in float32, whatever the type of `basis` is.
    """

    values: Tensor
    basis: Tensor
    scale: float = 1.0
    single: bool = False

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``, what the eigenproblem was solved in."""
        return "float32" if self.single else str(self.basis.dtype)[6:]

    @property
    def resolved(self) -> int:
        """How many values are more than what rounding leaves of zeros, k eps times the largest.

        Matrices of exactly low rank left up to 0.04 k eps. What float32 was enough for is far above.
        """
        least = self.values.numel() * torch.finfo(torch.float64).eps * float(self.values[-1])
        return int((self.values > max(least, 0.0)).sum())

    def tail(self, rank: int) -> float:
        """What rank r loses, the sum of the resolved values beyond it, of the scaled matrix."""
        beyond = self.values[self.values.numel() - self.resolved : -rank]
        return float(beyond.sum())

    @property
    def spectrum(self) -> Tensor:
        """[k] float64, descending: the squared singular values of the matrix itself; their tails are losses."""
        return self.values.clamp_min(0).flip(0) / self.scale**2
