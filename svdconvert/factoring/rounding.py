"""A matrix as weights of few bits: rounded as it is, or truncated and then rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.factoring.decompositions import load_decomposition, load_metrics
from svdconvert.grids import Grid
from svdconvert.linalg.exact import truncate
from svdconvert.linalg.integers import Rounded, unpack
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.rounded_factors import MatrixRounding, RoundedMatrix


class MeteredMatrix:
    """A matrix, its decomposition and both metrics."""

    def __init__(self, weight: Tensor, file: Path, dtype: torch.dtype, workspace: Workspace, sweeps: int = 0) -> None:
        """Read what belongs to it.

        Args:
            weight: [m, n], any floating type, on the device that computes.
            file: of its decomposition, with the other metric beside it.
            dtype: type that scales are stored in.
            workspace: buffers of the calling thread.
            sweeps: of coordinate descent after every feedback.
        """
        self.weight, self._workspace = weight, workspace
        self.found, small, diagonal = load_decomposition(file, weight.device)
        inner, outer = load_metrics(file, weight.device)
        tall = weight.shape[0] >= weight.shape[1]
        left, right = (outer, inner) if tall else (inner, outer)
        # Whether the text gives it inputs and gradients that are not all zero.
        self.is_seen = all(metric is not None and bool(metric.any()) for metric in (left, right))
        # A truncation sees the diagonal of the metric on the longer side, and not that it was kept in float32.
        self._pair = (diagonal, small) if tall else (small, diagonal)
        self._rounding = MatrixRounding(weight, left, right, dtype, sweeps=sweeps)

    def rounded(self, rank: int | None, grids: Sequence[Grid | None]) -> RoundedMatrix:
        """Its weights on grids; the loss is tr(L E R E^T).

        Args:
            rank: of the product; None for a dense matrix.
            grids: of each weight.

        Raises:
            InputError: a scale is not finite in its type.
        """
        if rank is None:
            (grid,) = grids
            assert grid is not None
            return self._rounding.dense(grid)
        down, up = grids
        assert down is not None
        assert up is not None
        factors = truncate(self.weight, self.found, rank, torch.float64, self._workspace, *self._pair)
        return self._rounding.balanced(factors.up, factors.down, (down, up))

    def tail(self, rank: int) -> float:
        """What a truncation loses before rounding, in the metrics."""
        return self.found.tail(rank) / self.found.scale**2


def stored(found: RoundedMatrix, grids: Sequence[Grid | None]) -> list[Tensor]:
    """The tensors of a rounded matrix, in the order of :meth:`svdconvert.planning.ranks.Target.tensors`."""
    return [
        tensor
        for weight, grid in zip(found.weights, grids, strict=True)
        for tensor in weight.tensors(0 if grid is None else grid.bits)
    ]


def multiplied(tensors: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """The matrix that :func:`stored` tensors make up, [m, n] float64.

    Args:
        tensors: as they are stored.
        grids: of each weight.
    """
    left = iter(tensors)
    weights = []
    for grid in grids:
        assert grid is not None
        words, scales, shape = next(left), next(left), next(left)
        weights.append(Rounded(unpack(words, grid.bits, int(shape[1])), scales).values(torch.float64))
    first, *rest = weights
    return rest[0] @ first if rest else first
