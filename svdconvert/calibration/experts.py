"""Statistics of the experts of a block, each of which sees some of the tokens only.

They are those of ``collector.py``, with sums over the tokens that an expert sees. C is still a mean over all tokens, to
which the others add nothing, so that the losses of all layers of a model compare; G is a mean over those that it sees,
since otherwise their share would be in the estimated loss twice.

Of some hundred tokens the moments of a thousand channels are known badly, so they are pulled towards what all experts
of the block have in common: as if :data:`PRIOR` tokens for each channel had been seen there before. Experts read and
write the same hidden states, so of those it is the mean over all of them; inner channels are each expert's own, and all
that they have in common is their mean energy. An expert without any token counts as one with one.

Memory beside that of ``collector.py``: one more matrix of each kind for the common moments. The sums of all experts may
be too many to be in memory together; then ``run.py`` collects them group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class ExpertSums:
    """Sums over the tokens that some experts see, of all processes.

    Attributes:
        input_gram, input_abs: by the first of the layers that read the same; empty where it is not collected.
        output_gram, fisher: by layer, likewise.
        counts, channels: tokens, and inputs, by the first of the layers that read the same.
        leaders: layer -> that first one.
        own_inputs: layers whose inputs are inner channels; of the others the outputs are.
    """

    input_gram: dict[str, Tensor]
    output_gram: dict[str, Tensor]
    input_abs: dict[str, Tensor]
    fisher: dict[str, Tensor]
    counts: dict[str, int]
    channels: dict[str, int]
    leaders: dict[str, str]
    own_inputs: frozenset[str]

    @property
    def starved(self) -> dict[str, int]:
        """Experts that saw fewer tokens than they have channels, and how many."""
        return {name.rpartition(".")[0]: n for name, n in self.counts.items() if n < self.channels[name]}

    def moments(self) -> list[tuple[str, str, Tensor, bool]]:
        """(statistic, layer, sum, whether its channels are an expert's own) of all that is pulled."""
        found = []
        for statistic, read in (("input_gram", True), ("input_abs", True), ("output_gram", False)):
            for name, each in getattr(self, statistic).items():
                found.append((statistic, name, each, (name in self.own_inputs) == read))
        return found


@dataclass
class Common:
    """Sums over all experts of a block, by statistic and kind of layer.

    Attributes:
        sums: [n, n], or [n] of mean absolute values, and of what is in the diagonal where channels are an expert's own.
        counts: tokens, each as often as experts have seen it.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, sums: ExpertSums) -> None:
        """Add those of some experts."""
        for statistic, name, each, own in sums.moments():
            key, part = f"{statistic} {kind(name)}", each.diagonal() if own and each.dim() == 2 else each
            if key not in self.sums:
                self.sums[key], self.counts[key] = torch.zeros_like(part), 0
            self.sums[key] += part.to(self.sums[key].device)
            self.counts[key] += sums.counts[sums.leaders[name]]

    def pull(self, sums: ExpertSums) -> None:
        """From sums over the tokens that experts have seen to means over them, pulled towards this. In place."""
        for statistic, name, each, own in sums.moments():
            key, count = f"{statistic} {kind(name)}", sums.counts[sums.leaders[name]]
            prior = PRIOR * each.shape[0]
            mean = self.sums[key].to(each.device) / max(self.counts[key], 1)
            (each.diagonal() if own and each.dim() == 2 else each).add_(mean.mean() if own else mean, alpha=prior)
            each.div_(count + prior)


class ExpertCollector:
    """Sums over what goes through the layers of experts. The hooks are set by who runs the block."""

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
        self._paths, self._needs = paths, needs
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

    def sums(self) -> ExpertSums:
        """Those of all batches of all processes; ends the collection."""
        group = self._group
        seen = group.add(torch.tensor(list(self._counts.values()))).tolist()
        found = ExpertSums(
            counts=dict(zip(self._counts, map(int, seen), strict=True)),
            channels={name: self._channels[name] for name in self._counts},
            input_gram={name: gram.mean(1, group) for name, gram in self._input_grams.items()},
            input_abs={name: group.add(total.cpu()) for name, total in self._abs.items()},
            output_gram={name: gram.mean(1, group) for name, gram in self._output_grams.items()},
            fisher={name: group.add(total.cpu()) for name, total in self._fisher.items()},
            leaders=dict(self._leaders),
            own_inputs=frozenset(name for name, path in self._paths.items() if self._routing.has_own_inputs(path)),
        )
        self._input_grams, self._output_grams = {}, {}
        return found


def expert_statistics(sums: ExpertSums, common: Common, tokens: int, samples: int) -> dict[str, ModuleStatistics]:
    """The statistics of some experts' layers.

    Args:
        sums: of these experts; they are used up.
        common: of all experts of the block.
        tokens, samples: of all processes.
    """
    common.pull(sums)
    for means in (sums.input_gram, sums.input_abs):
        for name, mean in means.items():
            mean.mul_(max(sums.counts[name], 1) / tokens)
    return {
        name: ModuleStatistics(
            input_gram=sums.input_gram.get(leader),
            output_gram=sums.output_gram.get(name),
            input_abs=sums.input_abs.get(leader),
            fisher=sums.fisher[name] / samples if sums.fisher else None,
            tokens=tokens,
            samples=samples,
        )
        for name, leader in sums.leaders.items()
    }


def _zeros(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=device)
