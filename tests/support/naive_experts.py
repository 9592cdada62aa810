"""Mixtures of experts by their formula: every expert is run on every token, and weighted by what the router gave it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.families.experts import Experts
from svdconvert.families.row import Architecture


class NaiveExperts(nn.Module):
    """The experts of a block in which transformers has them stacked, as linear layers of their own.

    Attributes:
        chosen: [tokens, experts] bool, of the last call.
    """

    def __init__(self, stacked: Any, experts: Experts) -> None:
        super().__init__()
        self.names, self.chosen = experts.names, torch.zeros(0, 0, dtype=torch.bool)
        self.stacked = (stacked,)  # not a module of this one
        self.clamped = experts.clamped
        count = len(stacked.down_proj)
        for number in range(count):
            expert = nn.Module()
            both, down = stacked.gate_up_proj[number], stacked.down_proj[number]
            both, down = (both.T, down.T) if experts.transposed else (both, down)
            for place, (name, weight) in enumerate(
                zip(experts.names, (*both.chunk(len(experts.names) - 1), down), strict=True)
            ):
                layer = nn.Linear(*reversed(weight.shape), bias=experts.biased)
                layer.weight = nn.Parameter(weight.detach().clone())
                if experts.biased:
                    biases = stacked.gate_up_proj_bias if place == 0 else stacked.down_proj_bias
                    layer.bias = nn.Parameter(biases[number].detach().clone())
                expert.add_module(name, layer)
            self.add_module(str(number), expert)

    def gated(self, expert: nn.Module, hidden: Tensor) -> Tensor:
        """The inner channels of an expert."""
        (stacked,), outputs = self.stacked, [expert.get_submodule(name)(hidden) for name in self.names[:-1]]
        if not self.clamped:
            gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
            return stacked.act_fn(gate) * up
        gate, up = outputs[0][:, ::2], outputs[0][:, 1::2]
        gate, up = gate.minimum(torch.tensor(stacked.limit)), up.clip(-stacked.limit, stacked.limit)
        return gate / (1 + (-stacked.alpha * gate).exp()) * (up + 1)

    def forward(self, hidden: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        if hidden.dim() == 3:  # gpt-oss in transformers 4, which has the weights of all experts
            found = self(hidden.flatten(0, 1), router_indices, routing_weights.gather(1, router_indices))
            return found.view_as(hidden)
        chosen, weights, count = router_indices, routing_weights, len(list(self.children()))
        share = torch.zeros(len(hidden), count).scatter(1, chosen, weights)
        self.chosen = torch.zeros(len(hidden), count, dtype=torch.bool).scatter(1, chosen, True)
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self.children()):
            down = expert.get_submodule(self.names[-1])
            total = total + share[:, number, None] * down(self.gated(expert, hidden))
        return total


def with_naive_experts(model: Any, row: Architecture) -> Any:
    """A stock model with experts as above in the place of stacked ones, under the names that files have."""
    if row.experts is None:
        return model
    for block in model.base_model.get_submodule(row.pieces.blocks):
        mixture = getattr(block, row.experts.mixture_5, None)
        if hasattr(getattr(mixture, "experts", None), "gate_up_proj"):
            mixture.experts = NaiveExperts(mixture.experts, row.experts)
            if not hasattr(block, row.experts.mixture):
                block.add_module(row.experts.mixture, mixture)
                block.__dict__[row.experts.mixture_5] = block._modules.pop(row.experts.mixture_5)
    return model


def chosen_tokens(model: Any, path: str) -> Tensor | None:
    """Which tokens of the last call an expert's layer got, [tokens] bool; None where it was called with no others."""
    where, _, rest = path.partition(".experts.")
    experts = model.base_model.get_submodule(f"{where}.experts") if rest else None
    return experts.chosen[:, int(rest.partition(".")[0])] if isinstance(experts, NaiveExperts) else None
