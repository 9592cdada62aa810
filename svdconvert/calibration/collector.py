"""Statistics of the linear layers of one block, collected by hooks while it is run.

For a linear layer y = W x + b, W [out, in], over all tokens that are not padding:

* input Gram C = E[x x^T] [in, in] (SVD-LLM, arXiv:2403.07378; the A of K-FAC, arXiv:1503.05671),
* output Gram G = E[g g^T] [out, out] (the G of K-FAC); g is the gradient with respect to y of the summed next-token
  cross-entropy of the sequence, in nats,
* mean absolute input E|x| [in] (ASVD, arXiv:2312.05821),
* Fisher vector [in] (FWSVD, arXiv:2207.00112): the mean over sequences of (dL/dW_ij)^2, L the same sum over one
  sequence, summed over the outputs i. The gradient of a batch would be squared after its samples had cancelled.

Experts of a mixture, which see some of the tokens, have sums of their own (``experts.py``).

Memory, with B sequences of T tokens in a batch: the Grams of the block in float64, of hidden size h and inner size f in
a GPT-NeoX block 8 (3 h^2 + f^2) bytes for C and 8 (11 h^2 + f^2) for G; :data:`~svdconvert.calibration.grams.ROWS` rows
of a layer's input a few times over; what the block's forward and backward passes hold for B T tokens; for the Fisher
vector one matrix and its square.

Several processes (``machine/processes.py``) take a part of the sequences each, and a block's sums are added up over
them, in float64 and with the same bits for all. They differ from a single process's by rounding alone
(``grams.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.calibration.experts import Common, ExpertCollector, ExpertSums, expert_statistics
from svdconvert.calibration.grams import GramSum
from svdconvert.errors import InputError
from svdconvert.families.row import Section
from svdconvert.linalg.precision import is_finite
from svdconvert.machine.processes import Group
from svdconvert.methods.statistics import STATISTICS, ModuleStatistics, Needs
from svdconvert.models.routing import Routing


class Collector:
    """Hooks on the linear layers of one block. Use as a context manager.

    Attributes:
        starved: experts that saw fewer tokens than they have channels, and how many; known with the result.
    """

    def __init__(
        self,
        block: nn.Module,
        modules: Mapping[str, tuple[str, Section | None]],
        needs: Needs,
        device: torch.device | None = None,
        group: Group | None = None,
        routing: Routing | None = None,
        *,
        exact: bool = True,
    ) -> None:
        """Prepare.

        Args:
            block: that will be run.
            modules: name -> path within the block, and which of its outputs count; None for all.
            needs: what to collect; gradients need a backward pass for every forward one.
            device: where the block is.
            group: processes that collect from other sequences.
            routing: of the block, watching; None if it has no experts.
            exact: whether all products of Grams are to be float64 (``grams.py``).
        """
        self._block, self._modules, self._needs = block, modules, needs
        self._group = group or Group()
        self._device, self._exact = device or torch.device("cpu"), exact
        self.experts: ExpertCollector | None = None
        self.starved: dict[str, int] = {}
        if routing is not None:
            paths = {name: path for name, (path, _) in modules.items() if routing.expert(path) is not None}
            if paths:
                self.experts = ExpertCollector(block, paths, needs, self._device, self._group, routing, exact=exact)
        self._leaders: dict[str, str] = {}
        self._input_grams: dict[str, GramSum] = {}
        self._output_grams: dict[str, GramSum] = {}
        self._abs: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}
        self._seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._handles: list[Any] = []
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._full = True
        self._tokens = self._samples = 0

    def __enter__(self) -> Collector:
        """Set the hooks."""
        for name, (path, section) in self._modules.items():
            of_expert = self.experts is not None and self.experts.has(name)
            hook = self.experts.hook(name) if self.experts is not None and of_expert else self._hook(name, section)
            self._handles.append(self._block.get_submodule(path).register_forward_hook(hook))
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._seen = {}

    def begin(self, mask: Tensor) -> None:
        """Announce a batch.

        Args:
            mask: [batch, length], bool; False is padding.
        """
        self._mask, self._full = mask.to(self._device), bool(mask.all())
        self._tokens += int(mask.sum())
        self._samples += mask.shape[0]
        self._seen = {}
        if self.experts is not None:
            self.experts.begin(self._mask)

    def result(self) -> dict[str, ModuleStatistics]:
        """The statistics of all batches of all processes; ends the collection.

        Raises:
            InputError: an input or gradient was NaN or infinite; the layer is named.
        """
        group = self._group
        counts = group.add(torch.tensor([self._tokens, self._samples]))
        tokens, samples = map(int, counts)
        # In the order in which the block calls its layers, which is the same in every process.
        grams = {name: gram.mean(tokens, group) for name, gram in self._input_grams.items()}
        absolutes = {name: group.add(total.cpu()) / tokens for name, total in self._abs.items()}
        of_experts = {} if self.experts is None else self._of_experts(self.experts.sums(), tokens, samples)

        def of_all_tokens(name: str) -> ModuleStatistics:
            leader = self._leaders[name]
            output = self._output_grams.pop(name, None)
            fisher = self._fisher.get(name)
            return ModuleStatistics(
                input_gram=grams.get(leader),
                output_gram=None if output is None else output.mean(tokens, group),
                input_abs=absolutes.get(leader),
                fisher=None if fisher is None else group.add(fisher.cpu()) / samples,
                tokens=tokens,
                samples=samples,
            )

        found = {}
        for name in self._modules:
            found[name] = of_experts.pop(name) if name in of_experts else of_all_tokens(name)
            refuse_nonfinite(name, statistic_tensors(found[name]))
        return found

    def expert_sums(self) -> tuple[ExpertSums, int, int]:
        """The sums of experts alone, and tokens and samples of all processes; ends the collection."""
        assert self.experts is not None
        counts = self._group.add(torch.tensor([self._tokens, self._samples])).tolist()
        return self.experts.sums(), counts[0], counts[1]

    def _of_experts(self, sums: ExpertSums, tokens: int, samples: int) -> dict[str, ModuleStatistics]:
        """Of all experts of the block."""
        common = Common()
        common.add(sums)
        self.starved = sums.starved
        return expert_statistics(sums, common, tokens, samples)

    def _hook(self, name: str, section: Section | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # OPT flattens batch and length before its MLP.
            x = args[0].detach().reshape(*self._mask.shape, -1)
            # Layers that read the same tensor share its statistics. It is kept until the forward pass ends, so that no
            # other tensor gets its address; its version shows whether it was changed in place.
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            leader, _ = self._seen.setdefault(key, (name, x))
            known = self._leaders.setdefault(name, leader)
            assert known == leader, f"{name} shared its input with {known} before, now with {leader}"
            if leader == name:
                self._add_input(name, x)
            if self._needs.gradients:
                shape = (*self._mask.shape, output.shape[-1])
                inputs = x if self._needs.fisher else None

                def add(gradient: Tensor) -> None:
                    self._seen = {}  # autograd keeps no inputs of layers whose weights have no gradient
                    own = gradient.detach().reshape(shape)
                    self._add_gradient(name, inputs, own if section is None else section.of(own, own.dim() - 1))

                output.register_hook(add)

        return hook

    def _add_input(self, name: str, x: Tensor) -> None:
        rows = self._rows(x)
        if self._needs.input_gram:
            if name not in self._input_grams:
                self._input_grams[name] = GramSum(x.shape[-1], self._device, exact=self._exact)
            self._input_grams[name].add(rows)
        if self._needs.input_abs:
            total = rows.abs().sum(dim=0, dtype=torch.float64)
            self._abs[name] = self._abs[name] + total if name in self._abs else total

    def _add_gradient(self, name: str, x: Tensor | None, gradient: Tensor) -> None:
        if self._needs.output_gram:
            if name not in self._output_grams:
                self._output_grams[name] = GramSum(gradient.shape[-1], self._device, exact=self._exact)
            self._output_grams[name].add(self._rows(gradient))
        if x is not None:
            total = self._fisher.get(name)
            if total is None:
                total = self._fisher[name] = torch.zeros(x.shape[-1], dtype=torch.float64, device=self._device)
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            for sample, counted in enumerate(self._mask):
                g, inputs = gradient[sample], x[sample]
                if not self._full:
                    g, inputs = g[counted], inputs[counted]
                # dL/dW [out, in] of this sequence alone.
                slope = g.to(wide).T @ inputs.to(wide)
                total += slope.square_().sum(dim=0, dtype=torch.float64)

    def _rows(self, tensor: Tensor) -> Tensor:
        """[batch, length, n] -> [tokens that are not padding, n]."""
        return tensor.reshape(-1, tensor.shape[-1]) if self._full else tensor[self._mask]


def part_statistics(whole: ModuleStatistics, section: Section) -> ModuleStatistics:
    """Statistics of a part of a fused projection, from those of the whole.

    Args:
        whole: of all outputs; without a Fisher vector, which is a sum over outputs.
        section: the part's outputs.
    """
    assert whole.fisher is None
    gram = whole.output_gram
    return whole if gram is None else replace(whole, output_gram=section.of(section.of(gram), 1).contiguous())


def refuse_nonfinite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """InputError if a statistic of a layer has NaN or infinite entries.

    Args:
        name: of the layer.
        tensors: by the statistics' names.
    """
    for kind, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(
                f"{name} has NaN or infinite {'inputs' if kind.startswith('input') else 'gradients'} on the "
                "calibration text; check the source model"
            )


def statistic_tensors(entry: ModuleStatistics) -> dict[str, Tensor]:
    """The statistics that a layer has, by their names in :data:`svdconvert.methods.statistics.STATISTICS`."""
    values = {kind: getattr(entry, kind) for kind in STATISTICS}
    return {kind: tensor for kind, tensor in values.items() if tensor is not None}
