"""What the losses of a price list have to be multiplied with, so that those of different matrices may be compared.

The metrics tell the ways to store one matrix apart, but take inputs and gradients for independent, which makes some
matrices seem dearer than they are (``factoring/token_losses.py``). One way of every list is measured token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def measured_worths(
    bench: Bench,
    store: Decompositions,
    tensors: Mapping[str, TensorInfo],
    targets: Sequence[Target],
    codes: Sequence[str],
    lists: Sequence[Sequence[Choice]],
) -> list[float]:
    """What the losses of each list are to be multiplied with, in bounds; 1 where no dense way on a grid loses anything.

    Args:
        bench: the model and its text.
        store: decompositions of the targets, with both metrics whole.
        tensors: of the model, as the targets name them.
        targets: single matrices.
        codes: of each, the type of weights and scales.
        lists: of each, with all its dense ways.

    Raises:
        InputError: something is NaN or infinite, or the disk is too small.
        JobError: reading or writing failed; the same call goes on.
    """
    ways = {t.module: way for t, choices in zip(targets, lists, strict=True) if (way := _measured_way(choices))}
    errors = _Errors(bench, store, tensors, {t.module: (t, code) for t, code in zip(targets, codes, strict=True)}, ways)
    grids = {module: [grid.bits, grid.group] for module, (grid, _) in ways.items()}
    key = {"procedure": PROCEDURE, "grids": grids, "types": list(codes)}
    found = TokenLosses(bench).measure(list(ways), errors, key) if ways else {}
    return bounded([found[t.module] / ways[t.module][1] if found.get(t.module) else None for t in targets])


def bounded(worths: Sequence[float | None]) -> list[float]:
    """Worths between :data:`LOWEST` and :data:`HIGHEST` times their median; 1 for those that are None.

    Args:
        worths: as they were measured, positive.
    """
    middle = median([worth for worth in worths if worth is not None] or [1.0])
    return [1.0 if worth is None else min(max(worth, LOWEST * middle), HIGHEST * middle) for worth in worths]


def _measured_way(choices: Sequence[Choice]) -> tuple[Grid, float] | None:
    """The grid and the loss of the dense way that is measured; None where there is none that loses anything."""
    ways = [(choice.grids[0], choice.loss) for choice in choices if choice.rank is None and choice.grids]
    seen = [(grid, loss) for grid, loss in ways if grid is not None and loss > 0]
    return min(seen, key=lambda way: (abs(way[0].bits - MEASURED_BITS), way), default=None)


class _Errors:
    """Block -> path within it -> error of that matrix, made when it is asked for."""

    def __init__(
        self,
        bench: Bench,
        store: Decompositions,
        tensors: Mapping[str, TensorInfo],
        targets: Mapping[str, tuple[Target, str]],
        ways: Mapping[str, tuple[Grid, float]],
    ) -> None:
        self._bench, self._store, self._tensors = bench, store, tensors
        self._targets, self._ways = targets, ways

    def __call__(self, index: int) -> Mapping[str, Tensor]:
        with WeightReader(self._bench.source) as reader:
            return {
                suffix(module): self._error(reader, *self._targets[module], grid)
                for module, (grid, _) in self._ways.items()
                if layer_number(module) == index
            }

    def _error(self, reader: WeightReader, target: Target, code: str, grid: Grid) -> Tensor:
        info, device = self._tensors[target.weight], torch.device(self._bench.device)
        weight = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).to(device)
        path: Path = self._store.path(target)
        found = MeteredMatrix(weight, path, torch_dtype(code), Workspace()).rounded(None, (grid,))
        return (found.product() - weight.double()).float()
