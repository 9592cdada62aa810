"""Decomposing one matrix, or one group of layers that share a factor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.stores import GroupStore, LayerStatistics, Store
from svdconvert.linalg.exact import decompose
from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.output_losses import output_losses
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.shared import decompose_shared, decompose_stack, outer_statistic
from svdconvert.machine.lanes import Lanes
from svdconvert.methods.table import Method
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.storage.reader import TensorsInTurn, Turned, WeightReader
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo

if TYPE_CHECKING:
    from svdconvert.methods.statistics import ModuleStatistics


@dataclass(frozen=True)
class Task:
    """What all threads that decompose a model have in common.

    Attributes:
        source: the dense model.
        tensors: of it, as the targets name them.
        method, options: how metrics are made.
        store: where decompositions go.
        groups: keeps statistics of groups; None where there are no groups with metrics.
        lanes: ways to the device that computes.
        events: receiver of progress.
        reading: held by whoever reads from the source, so that no two threads fetch the same file.
    """

    source: Source
    tensors: Mapping[str, TensorInfo]
    method: Method
    options: Mapping[str, Any]
    store: Store
    groups: GroupStore | None
    lanes: Lanes
    events: Events
    reading: threading.Lock


class Decomposer:
    """Decomposes targets in one thread, with buffers and an open file of its own. Use it as a context manager."""

    def __init__(self, task: Task) -> None:
        self._task, self._device, self._lane = task, task.lanes.device, task.lanes.worker()
        self._reader, self._workspace = WeightReader(task.source), Workspace()

    def __enter__(self) -> Decomposer:
        """Nothing is open yet."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the open file."""
        self._reader.close()

    def rest(self) -> None:
        """Give memory back until the next matrix."""
        self._workspace.clear()

    def plain(self, target: Target) -> None:
        """Decompose a matrix, or a group as a stack, without metrics.

        Raises:
            InputError: it has NaN or infinite entries; the tensor is named.
        """
        task = self._task
        with self._working_on(target), self._lane:
            infos = [task.tensors[part.weight] for part in target.parts]
            stored = TensorsInTurn(self._reader, infos, self._device, task.reading)
            weights = Turned(stored) if target.transposed else stored
            try:
                if target.followers:
                    found = decompose_stack(weights, self._workspace, tall=_is_tall(target))
                else:
                    found = decompose(weights[0], self._workspace)
            except InputError as error:
                raise _named(target.parts[stored.place].weight, error) from None
            task.source.refuse_changed()
            task.store.save(target, found, None, None, None)

    def matrix(self, target: Target, statistics: ModuleStatistics) -> None:
        """Decompose a matrix in its metrics. Raises as :meth:`plain`, and where a statistic is not finite."""
        task = self._task
        with self._working_on(target), self._lane:
            weight = self._weights(target, 0)[0]
            left, right, is_gram = self._metrics(target, 0, statistics)
            with _naming(target.weight):
                decomposition = decompose(weight, self._workspace, left, right)
                gram = right if is_gram else _on(statistics.input_gram, self._device)
                outputs = None if gram is None else output_losses(weight, decomposition, left, right, gram)
            inner, outer = (right, left) if _is_tall(target) else (left, right)
            task.source.refuse_changed()
            task.store.save(target, decomposition, inner, outer, outputs)

    def layer(self, target: Target, index: int, statistics: ModuleStatistics) -> None:
        """Keep what has to be known of one layer of a group. Raises as :meth:`matrix`."""
        task = self._task
        task.events.solving(announcement(task.tensors, target))
        with self._lane:
            weight = self._weights(target, index)[0]
            left, right, _ = self._metrics(target, index, statistics)
            with _naming(target.parts[index].weight):
                outer = outer_statistic(weight, left, tall=_is_tall(target))
            assert right is not None  # every method that uses a text has a metric on the inputs
            shrinkage = float(task.options.get("shrinkage", 0.0))
            is_known = statistics.input_gram is not None and shrinkage < 1
            kept = LayerStatistics(right, outer, statistics.tokens, shrinkage if is_known else None)
            task.source.refuse_changed()
            self._groups.keep_layer(target, index, kept)

    def group(self, target: Target) -> None:
        """Decompose a group all of whose layers are known."""
        places, groups = range(len(target.parts)), self._groups
        with self._lane:
            decomposition = decompose_shared(
                [partial(groups.outer, target, index, self._device) for index in places],
                [partial(groups.inner, target, index, self._device) for index in places],
                [groups.tokens(target, index) for index in places],
                None if _is_tall(target) else self._weights(target),
                self._workspace,
            )
            groups.save_group(target, decomposition)
        self._task.events.decomposed(announcement(self._task.tensors, target))

    @property
    def _groups(self) -> GroupStore:
        assert self._task.groups is not None
        return self._task.groups

    @contextmanager
    def _working_on(self, target: Target) -> Iterator[None]:
        step = announcement(self._task.tensors, target)
        self._task.events.solving(step)
        yield
        self._task.events.decomposed(step)

    def _metrics(self, target: Target, index: int, statistics: ModuleStatistics) -> tuple[Metric, Metric, bool]:
        """Metrics on the outputs and the inputs of a layer, on the device; whether the latter is their second moment.

        It is without shrinkage, and need not be on the device twice.
        """
        left, right = self._task.method.metrics(statistics, self._task.options)
        is_gram = right is statistics.input_gram
        left, right = _on(left, self._device), _on(right, self._device)
        if any(side is not None and not bool(side.any()) for side in (left, right)):
            weight = target.parts[index].weight
            self._task.events.note(
                f"the calibration text gives {weight} nothing but zeros, so it is factored as without a text"
            )
        return left, right, is_gram

    def _weights(self, target: Target, index: int | None = None) -> list[Tensor]:
        """Matrices of a target, or one of them; valid until the next call."""
        infos = [self._task.tensors[part.weight] for part in target.parts]
        infos = infos if index is None else infos[index : index + 1]
        buffer = self._workspace.take("weight", (sum(i.nbytes for i in infos),), torch.uint8, torch.device("cpu"))
        weights, start = [], 0
        for info in infos:
            with self._task.reading:
                weight = self._reader.read(info, buffer[start:]).to(self._device)
            weights.append(weight.T if target.transposed else weight)
            start += info.nbytes
        return weights


def announcement(tensors: Mapping[str, TensorInfo], target: Target) -> Step:
    """A step for the progress display."""
    return Step("decompose", target.weight, tuple(tensors[part.weight] for part in target.parts), ())


def _is_tall(target: Target) -> bool:
    return target.shape[0] >= target.shape[1]


@contextmanager
def _naming(weight: str) -> Iterator[None]:
    """Say which tensor an InputError is about."""
    try:
        yield
    except InputError as error:
        raise _named(weight, error) from None


def _named(weight: str, error: InputError) -> InputError:
    return InputError(f"tensor {weight} cannot be converted: {error.sentence.marked}")


def _on(metric: Metric, device: torch.device) -> Metric:
    return None if metric is None else metric.to(device)
