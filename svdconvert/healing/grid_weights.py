"""Weights on integer grids whose scales are trained while their integers stay as they are.

The scale of a group begins as s and becomes s (1 + 10 t): what is trained is t. AdamW's steps are as long as the
learning rate, whatever is trained; so scales, of which there are large and small ones, move by a share of themselves,
and by one that is best at learning rates that are best for factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from svdconvert.linalg.integers import Rounded

# What a scale moves by, relative to itself, where its parameter moves by 1.
RELATIVE = 10.0


class GridWeight(nn.Module):
    """A parametrization of a weight [m, n]: from what is trained, [m, groups] float32, to integers times scales.

    The integers are in memory as they are, 1 byte each; the product is made anew at every use.
    """

    codes: Tensor
    start: Tensor

    def __init__(self, rounded: Rounded, device: torch.device) -> None:
        """Take a weight as it is stored.

        Args:
            rounded: integers and scales.
            device: that computes.
        """
        super().__init__()
        self.register_buffer("codes", rounded.codes.to(device), persistent=False)
        self.register_buffer("start", rounded.scales.to(device, torch.float32), persistent=False)

    def forward(self, moved: Tensor) -> Tensor:
        """[m, groups] -> the weight."""
        product: Tensor = _Product.apply(self.codes, self.scales(moved))
        return product

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained, as long as nothing has moved."""
        return torch.zeros_like(self.start)

    def scales(self, moved: Tensor) -> Tensor:
        """[m, groups] -> the scales, float32."""
        return torch.addcmul(self.start, self.start, moved, value=RELATIVE)

    def moved(self, scales: Tensor) -> Tensor:
        """The reverse of :meth:`scales`: exactly that where scales of 16 bits have moved by less than a tenth."""
        change = scales.to(self.start) - self.start
        return torch.where(change == 0, 0.0, change / (RELATIVE * self.start))


class _Product(torch.autograd.Function):
    """Integers times scales. Autograd by itself would keep the integers in float32 for the backward pass."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scales: Tensor) -> Tensor:
        """[m, n] integers and [m, groups] scales -> [m, n]."""
        ctx.save_for_backward(codes)
        ctx.groups = scales.shape[1]
        return Rounded(codes, scales).values(scales.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """The gradient of a scale: the sum over its group of integers times gradients of entries."""
        (codes,) = ctx.saved_tensors
        return None, (gradient * codes).unflatten(1, (ctx.groups, -1)).sum(dim=-1)


def put_on_grid(module: nn.Module, path: str, rounded: Rounded) -> tuple[GridWeight, nn.Parameter]:
    """Have a linear layer compute with integers times scales; its own weight is given up.

    Args:
        module: that holds it.
        path: of the layer's weight in the module.
        rounded: what it is.

    Returns:
        The parametrization, and what it has to be trained by.
    """
    layer = module.get_submodule(path.rpartition(".")[0])
    weight = layer.weight
    assert isinstance(weight, Tensor)
    grid = GridWeight(rounded, weight.device)
    parametrize.register_parametrization(layer, "weight", grid, unsafe=True)
    trained = layer.get_parameter("parametrizations.weight.original")
    return grid, trained


def take_off_grid(module: nn.Module, path: str) -> None:
    """Undo :func:`put_on_grid`, without a weight that could be used."""
    parametrize.remove_parametrizations(module.get_submodule(path.rpartition(".")[0]), "weight", False)
