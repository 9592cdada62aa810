"""Factors in memory that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svdconvert.storage.reader import torch_dtype
from svdconvert.storage.source import Source


class Trained:
    """Parameters that are trained in float32, and rounded where they are stored.

    Attributes:
        factors: tensor of the checkpoint -> the parameter, float32.
        start: the same -> its values at first, in the type that it is stored in.
    """

    def __init__(self, source: Source, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take parameters.

        Args:
            source: the checkpoint that they are of.
            parameters: by their names in it.
        """
        self.factors = dict(parameters)
        for parameter in self.factors.values():
            parameter.requires_grad_()
        self._types = {name: torch_dtype(source.tensors[name].dtype) for name in parameters}
        self.start: dict[str, Tensor] = self.stored()

    def stored(self) -> dict[str, Tensor]:
        """Copies of the factors as a checkpoint has them, in its types, on the device."""
        return {name: factor.detach().to(self._types[name], copy=True) for name, factor in self.factors.items()}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the factors these values, of any floating type."""
        for name, factor in self.factors.items():
            factor.copy_(tensors[name])

    @contextmanager
    def having(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which the factors have other values."""
        own = {name: factor.detach().clone() for name, factor in self.factors.items()}
        self.put(tensors)
        try:
            yield
        finally:
            self.put(own)
