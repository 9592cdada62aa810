"""Mixtures of experts by their formula: every expert is run on every token, and weighted by what the router gave it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.families.row import Architecture


class NaiveExperts(nn.Module):
    """The experts of a block of transformers 5, in which they are stacked, as linear layers of their own.

    Attributes:
        chosen: [tokens, experts] bool, of the last call.
    """

    def __init__(self, stacked: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names, self.chosen = names, torch.zeros(0, 0, dtype=torch.bool)
        self.activation = (stacked.act_fn,)  # not a module of this one
        for number, (both, down) in enumerate(zip(stacked.gate_up_proj, stacked.down_proj, strict=True)):
            expert = nn.Module()
            for name, weight in zip(names, (*both.chunk(2), down), strict=True):
                layer = nn.Linear(*reversed(weight.shape), bias=False)
                layer.weight = nn.Parameter(weight.detach().clone())
                expert.add_module(name, layer)
            self.add_module(str(number), expert)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        count = len(list(self.children()))
        share = torch.zeros(len(hidden), count).scatter(1, chosen, weights)
        self.chosen = torch.zeros(len(hidden), count, dtype=torch.bool).scatter(1, chosen, True)
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            gate, up, down = (expert.get_submodule(name) for name in self.names)
            total = total + share[:, number, None] * down(self.activation[0](gate(hidden)) * up(hidden))
        return total


def with_naive_experts(model: Any, row: Architecture) -> Any:
    """A stock model with experts as above in the place of stacked ones, under the names that files have."""
    if row.experts is None:
        return model
    for block in model.base_model.get_submodule(row.pieces.blocks):
        mixture = getattr(block, row.experts.mixture_5, None)
        if hasattr(getattr(mixture, "experts", None), "gate_up_proj"):
            mixture.experts = NaiveExperts(mixture.experts, row.experts.names)
            if not hasattr(block, row.experts.mixture):
                block.add_module(row.experts.mixture, mixture)
                block.__dict__[row.experts.mixture_5] = block._modules.pop(row.experts.mixture_5)
    return model


def chosen_tokens(model: Any, path: str) -> Tensor | None:
    """Which tokens of the last call an expert's layer got, [tokens] bool; None where it was called with no others."""
    where, _, rest = path.partition(".experts.")
    experts = model.base_model.get_submodule(f"{where}.experts") if rest else None
    return experts.chosen[:, int(rest.partition(".")[0])] if isinstance(experts, NaiveExperts) else None
