"""Where decompositions go: what :mod:`svdconvert.factoring.decompose` asks of those who take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.results import Decomposition
from svdconvert.linalg.shared import SharedDecomposition
from svdconvert.planning.ranks import Target


@dataclass(frozen=True)
class LayerStatistics:
    """What has to be known of one layer of a group until the whole group is.

    Attributes:
        inner: metric on its inputs, [n, n] or its diagonal [n].
        outer: its :func:`svdconvert.linalg.shared.outer_statistic`.
        tokens: what both were averaged over.
        shrinkage: how far the inputs' second moment was shrunk to give ``inner``; None where it cannot be had from it.
    """

    inner: Tensor
    outer: Metric
    tokens: int
    shrinkage: float | None = None


class Store(Protocol):
    """Takes the decompositions of single matrices, and of groups that have no metrics."""

    def has(self, target: Target) -> bool:
        """Whether a target is done."""
        ...

    def save(
        self, target: Target, decomposition: Decomposition, inner: Metric, outer: Metric, outputs: torch.Tensor | None
    ) -> None:
        """Take one target's decomposition; it is valid until the next one.

        Args:
            target: a matrix; a group only where it has no metrics.
            decomposition: its decomposition.
            inner: metric on the smaller side.
            outer: metric on the longer side.
            outputs: :func:`svdconvert.linalg.output_losses.output_losses`, or None where the inputs are not known.
        """
        ...


class GroupStore(Protocol):
    """Keeps the statistics of layers that share a factor until those of the whole group are there."""

    def keep_layer(self, target: Target, index: int, statistics: LayerStatistics) -> None:
        """Keep those of one layer of a group."""
        ...

    def has_layer(self, target: Target, index: int) -> bool:
        """Whether those of a layer are there."""
        ...

    def inner(self, target: Target, index: int, device: torch.device) -> Tensor:
        """A layer's :attr:`LayerStatistics.inner`."""
        ...

    def outer(self, target: Target, index: int, device: torch.device) -> Metric:
        """A layer's :attr:`LayerStatistics.outer`."""
        ...

    def tokens(self, target: Target, index: int) -> int:
        """A layer's :attr:`LayerStatistics.tokens`."""
        ...

    def save_group(self, target: Target, decomposition: SharedDecomposition) -> None:
        """Take the decomposition of a group, and give up what is not needed of its layers any more."""
        ...
