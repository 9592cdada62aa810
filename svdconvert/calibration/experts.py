"""Statistics of the experts of a block, each of which sees some of the tokens only.

They are those of ``collector.py``, with sums over the tokens that an expert sees. C is still a mean over all tokens, to
which the others add nothing, so that the losses of all layers of a model compare; G is a mean over those that it sees,
since otherwise their share would be in the estimated loss twice.

Of some hundred tokens the moments of a thousand channels are known badly, so they are pulled towards what all experts
of the block have in common: as if :data:`PRIOR` tokens for each channel had been seen there before. Experts read and
write the same hidden states, so of those it is the mean over all of them; inner channels are each expert's own, and all
that they have in common is their mean energy. An expert without any token counts as one with one.

Memory beside that of ``collector.py``: one more matrix for the common moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.calibration.grams import GramSum
from svdconvert.machine.processes import Group
from svdconvert.methods.statistics import ModuleStatistics, Needs
from svdconvert.models.routing import Routing
from svdconvert.names import kind

# Tokens for each channel that the common moments count as (docs/experts.md).
PRIOR = 0.25


class ExpertCollector:
    """Sums over what goes through the layers of experts. The hooks are set by who runs the block.

    Attributes:
        starved: experts that saw fewer tokens than they have channels, and how many; known with the result.
    """

    def __init__(
        self,
        block: nn.Module,
        paths: Mapping[str, str],
        needs: Needs,
        device: torch.device,
        group: Group,
        routing: Routing,
        *,
        exact: bool = True,
    ) -> None:
        """Start at zero.

        Args:
            block: that will be run.
            paths: name of an expert's layer -> path within the block.
            needs: what to collect.
            device: where the block is.
            group: processes that collect from other sequences.
            routing: of the block, watching.
            exact: whether all products of Grams are to be float64 (``grams.py``).
        """
        self._paths, self._needs, self._device = paths, needs, device
        self._group, self._routing = group, routing
        sizes = {name: block.get_submodule(path) for name, path in paths.items()}
        # layers that read the same: the first one of an expert's
        first: dict[tuple[int | None, bool], str] = {}
        self._leaders = {
            name: first.setdefault((routing.expert(path), routing.has_own_inputs(path)), name)
            for name, path in paths.items()
        }
        leaders = set(first.values())
        self._counts = {name: 0 for name in paths if name in leaders}
        ins = {name: int(sizes[name].in_features) for name in paths}  # type: ignore[arg-type]
        outs = {name: int(sizes[name].out_features) for name in paths}  # type: ignore[arg-type]
        self._input_grams = {n: GramSum(ins[n], device, exact=exact) for n in self._counts} if needs.input_gram else {}
        self._output_grams = {n: GramSum(outs[n], device, exact=exact) for n in paths} if needs.output_gram else {}
        self._abs = {n: _zeros(ins[n], device) for n in self._counts} if needs.input_abs else {}
        self._fisher = {n: _zeros(ins[n], device) for n in paths} if needs.fisher else {}
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._channels = ins
        self.starved: dict[str, int] = {}

    def has(self, name: str) -> bool:
        """Whether a layer is one of them."""
        return name in self._paths

    def begin(self, mask: Tensor) -> None:
        """Announce a batch; [batch, length], bool, on the device."""
        self._mask = mask

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        """The forward hook of a layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x, tokens = args[0].detach(), self._routing.tokens(self._paths[name])
            assert tokens is not None
            counted = self._mask.flatten()[tokens]
            sequence = tokens[counted] // self._mask.shape[1]
            x = x[counted]
            if self._leaders[name] == name:
                self._counts[name] += len(x)
                if self._needs.input_gram:
                    self._input_grams[name].add(x)
                if self._needs.input_abs:
                    self._abs[name] += x.abs().sum(dim=0, dtype=torch.float64)
            if self._needs.gradients:
                inputs = x if self._needs.fisher else None
                output.register_hook(
                    lambda gradient: self._add_gradient(name, inputs, gradient.detach()[counted], sequence)
                )

        return hook

    def _add_gradient(self, name: str, x: Tensor | None, gradient: Tensor, sequence: Tensor) -> None:
        if self._needs.output_gram:
            self._output_grams[name].add(gradient)
        if x is not None:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            for sample in sequence.unique().tolist():
                own = sequence == sample
                slope = gradient[own].to(wide).T @ x[own].to(wide)
                self._fisher[name] += slope.square_().sum(dim=0, dtype=torch.float64)

    def result(self, tokens: int, samples: int) -> dict[str, ModuleStatistics]:
        """The statistics of all batches of all processes; ends the collection.

        Args:
            tokens, samples: of all processes.
        """
        group, leaders = self._group, self._leaders
        seen = group.add(torch.tensor(list(self._counts.values()))).tolist()
        counts = dict(zip(self._counts, map(int, seen), strict=True))
        inputs = {name: gram.mean(1, group) for name, gram in self._input_grams.items()}
        absolutes = {name: group.add(total.cpu()) for name, total in self._abs.items()}
        outputs = {name: gram.mean(1, group) for name, gram in self._output_grams.items()}
        self._input_grams, self._output_grams = {}, {}
        of = {name: counts[leader] for name, leader in leaders.items()}
        for sums, read in ((inputs, True), (absolutes, True), (outputs, False)):
            for alike in self._by_kind(sums):
                own = self._routing.has_own_inputs(self._paths[next(iter(alike))]) == read
                pull(alike, of, own_channels=own)
        for name in {**inputs, **absolutes}:
            share = max(of[name], 1) / tokens
            for means in (inputs, absolutes):
                if name in means:
                    means[name].mul_(share)
        self.starved = {
            name.rpartition(".")[0]: count for name, count in counts.items() if count < self._channels[name]
        }
        return {
            name: ModuleStatistics(
                input_gram=inputs.get(leader),
                output_gram=outputs.get(name),
                input_abs=absolutes.get(leader),
                fisher=group.add(self._fisher[name].cpu()) / samples if self._needs.fisher else None,
                tokens=tokens,
                samples=samples,
            )
            for name, leader in leaders.items()
        }

    def _by_kind(self, sums: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The same kind of layer in all experts."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, each in sums.items():
            found.setdefault(kind(name), {})[name] = each
        return list(found.values())


def pull(sums: Mapping[str, Tensor], counts: Mapping[str, int], *, own_channels: bool) -> None:
    """From sums over the tokens that each expert has seen to means over them, pulled towards the common ones. In place.

    Args:
        sums: layer -> sum of x xᵀ, [n, n], or of |x|, [n], of the same kind of layer in all experts of a block.
        counts: layer -> tokens that it has seen.
        own_channels: whether the channels are each expert's own.
    """
    total, first = sum(counts[name] for name in sums), next(iter(sums.values()))
    prior = PRIOR * first.shape[0]
    common = torch.zeros_like(first)
    for each in sums.values():
        common += each
    common /= max(total, 1)
    if own_channels:
        energy = (common.diagonal() if common.dim() == 2 else common).mean()
        common.zero_()
        (common.diagonal() if common.dim() == 2 else common).fill_(energy)
    for name, each in sums.items():
        each.add_(common, alpha=prior).div_(counts[name] + prior)


def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=device)
