"""What a plan would write, a block's matrices at a time, to the bit; nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdconvert.factoring.operations import run
from svdconvert.factoring.rounding import multiplied
from svdconvert.linalg.panels import Workspace
from svdconvert.models.stream import Weights
from svdconvert.names import layer_number, suffix
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.storage.reader import TensorsInTurn, WeightReader
from svdconvert.storage.source import Source


class Truncations:
    """The products of a plan's factors and its rounded matrices, made as its blocks are asked for.

    A group of layers that share a factor is made once for all its blocks; its factors wait in memory meanwhile.
    """

    def __init__(self, source: Source, targets: Sequence[Target], steps: Sequence[Step], device: torch.device) -> None:
        """Prepare.

        Args:
            source: the dense model.
            targets: all targets, with their ranks.
            steps: of the plan.
            device: what computes.
        """
        self._source, self._device, self._workspace = source, device, Workspace()
        self._steps = {step.key: step for step in steps}
        self._blocks: dict[int, list[tuple[Target, int]]] = {}
        for target in targets:
            for place, part in enumerate(target.parts if target.rank is not None or target.rounded else ()):
                self._blocks.setdefault(layer_number(part.module), []).append((target, place))
        # Factors of groups, and the layers that have not been asked for yet.
        self._groups: dict[str, tuple[list[Tensor], set[int]]] = {}

    def __call__(self, index: int) -> Weights:
        """The matrices [out, in] of one block, float64."""
        return {
            suffix(target.parts[place].module): self._product(target, place)
            for target, place in self._blocks.get(index, [])
        }

    def _product(self, target: Target, place: int) -> Tensor:
        if target.rounded:
            return multiplied(self._factors(target), target.grids)
        if not target.followers:
            return target.layout.product(self._factors(target))
        if target.module not in self._groups:
            self._groups[target.module] = (self._factors(target), set(range(len(target.parts))))
        (down, *ups), left = self._groups[target.module]
        left.discard(place)
        if not left:
            del self._groups[target.module]
        return target.layout.product([down, ups[place]])

    def _factors(self, target: Target) -> list[Tensor]:
        """The tensors that the target's step would write."""
        step = self._steps[target.weight]
        self._source.refuse_changed()
        with WeightReader(self._source) as reader:
            stored = TensorsInTurn(reader, step.inputs, self._device)
            return run(step, stored, self._workspace)[0]
