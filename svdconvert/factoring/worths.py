"""What the losses of a price list have to be multiplied with, so that those of different matrices may be compared.

The metrics tell the ways to store one matrix apart, but take inputs and gradients for independent, which makes some
matrices seem dearer than they are (``factoring/token_losses.py``). So one dense way of every list is measured token by
token.

Products have worths of their own. What a truncation leaves out lies in few directions, which some tokens have most of:
on SmolLM2-135M at a quarter of the bytes the products of queries and keys cost 1.3 and 1.8 times (medians) what the
worths of dense ways say, and a single down projection 8 times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from svdconvert.factoring.decompositions import Decompositions
from svdconvert.factoring.rounding import MeteredMatrix
from svdconvert.factoring.sampled import Bench
from svdconvert.factoring.token_losses import TokenLosses
from svdconvert.grids import Grid
from svdconvert.linalg.feedback import PROCEDURE
from svdconvert.linalg.panels import Workspace
from svdconvert.names import layer_number, suffix
from svdconvert.planning.choices import Choice
from svdconvert.planning.ranks import Target
from svdconvert.storage.reader import WeightReader, torch_dtype
from svdconvert.tensors import TensorInfo

# The dense way that is nearest to so many bits is measured: where budgets bind, and errors are still small.
MEASURED_BITS = 3
# A worth counts between these multiples of their median, so that a matrix whose error a text hardly meets is not taken
# for free. They are wider than what was seen: Gemma 3 270M has down projections at a 180th of the median, since one
# massive token, the opening one, makes up their metric and has no gradient, and that is as it should be.
LOWEST, HIGHEST = 1e-3, 1e3


def dense_way(choices: Sequence[Choice]) -> Choice | None:
    """The dense choice that is measured; None where there is none on a grid that loses anything."""
    ways = [choice for choice in choices if choice.rank is None and is_measurable(choice)]
    return min(ways, key=lambda way: (abs(_grids(way)[0].bits - MEASURED_BITS), _grids(way), way.loss), default=None)


def product_way(choices: Sequence[Choice], price: float) -> Choice | None:
    """The product that is measured: the best one where a byte has a price; None where there is none on grids.

    Args:
        choices: of a matrix.
        price: in their losses' currency; infinite for the one of the fewest bytes.
    """
    ways = [choice for choice in choices if choice.rank is not None and is_measurable(choice)]
    if price == float("inf"):
        return min(ways, key=lambda way: (way.nbytes, way.loss), default=None)
    return min(ways, key=lambda way: (way.loss + price * way.nbytes, way.nbytes), default=None)


def bounded(worths: Sequence[float | None]) -> list[float | None]:
    """Worths between :data:`LOWEST` and :data:`HIGHEST` times their median; None stays.

    Args:
        worths: as they were measured, positive.
    """
    middle = median([worth for worth in worths if worth is not None] or [1.0])
    return [None if worth is None else min(max(worth, LOWEST * middle), HIGHEST * middle) for worth in worths]


@dataclass(frozen=True)
class Worths:
    """Measures worths on a model and its text.

    Attributes:
        bench: the model and its text.
        store: decompositions of the targets, with both metrics whole.
        tensors: of the model, as the targets name them.
        targets: single matrices.
        codes: of each, the type of weights and scales.
    """

    bench: Bench
    store: Decompositions
    tensors: Mapping[str, TensorInfo]
    targets: Sequence[Target]
    codes: Sequence[str]

    def of(self, ways: Sequence[Choice | None]) -> list[float | None]:
        """What the losses of choices like these are to be multiplied with, in bounds; None where there is no choice.

        Args:
            ways: of each target, on grids, with a loss in the metrics above zero.

        Raises:
            InputError: something is NaN or infinite, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        named = {t.module: way for t, way in zip(self.targets, ways, strict=True) if way is not None}
        if not named:
            return [None] * len(ways)
        told = {module: [way.rank, [[grid.bits, grid.group] for grid in _grids(way)]] for module, way in named.items()}
        key = {"procedure": PROCEDURE, "ways": told, "types": list(self.codes)}
        found = TokenLosses(self.bench).measure(list(named), lambda index: self._errors(index, named), key)
        worths = bounded([found[module] / way.loss if found[module] > 0 else None for module, way in named.items()])
        by_module = dict(zip(named, worths, strict=True))
        return [by_module.get(target.module) for target in self.targets]

    def _errors(self, index: int, ways: Mapping[str, Choice]) -> Mapping[str, Tensor]:
        """Path within a block -> error of that matrix."""
        with WeightReader(self.bench.source) as reader:
            return {
                suffix(target.module): self._error(reader, target, code, ways[target.module])
                for target, code in zip(self.targets, self.codes, strict=True)
                if target.module in ways and layer_number(target.module) == index
            }

    def _error(self, reader: WeightReader, target: Target, code: str, way: Choice) -> Tensor:
        info, device = self.tensors[target.weight], torch.device(self.bench.device)
        weight = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).to(device)
        path: Path = self.store.path(target)
        found = MeteredMatrix(weight, path, torch_dtype(code), Workspace()).rounded(way.rank, way.grids)
        return (found.product() - weight.double()).float()


def _grids(choice: Choice) -> list[Grid]:
    return [grid for grid in choice.grids if grid is not None]


def is_measurable(choice: Choice) -> bool:
    """Whether all of its weights are on grids and it loses anything, so that there is an error to measure."""
    return bool(choice.grids) and None not in choice.grids and choice.loss > 0
