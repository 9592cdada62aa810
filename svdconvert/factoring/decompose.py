"""Decomposing every target of a model, block by block, in several threads and processes.

What becomes of the results is up to a :class:`Store`; :mod:`svdconvert.factoring.decompositions` keeps them in files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.decompositions import Decompositions, decompositions_key, load_metric
from svdconvert.linalg.exact import decompose
from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.output_losses import output_losses
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.precision import check_entries
from svdconvert.linalg.results import Decomposition
from svdconvert.linalg.shared import decompose_shared, outer_statistic
from svdconvert.machine.lanes import Lanes, lanes_of
from svdconvert.machine.processes import current
from svdconvert.machine.threads import in_threads, usual_workers
from svdconvert.methods.table import Method
from svdconvert.names import layer_number
from svdconvert.planning.events import Events
from svdconvert.planning.partition import matrix_cost, split
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.planning.targets import target_tensors
from svdconvert.sentences import Sentence, asked
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_files import read_tensors, write_tensors
from svdconvert.tensors import TensorInfo

if TYPE_CHECKING:
    from svdconvert.calibration.knowledge import Knowledge, StatisticsProvider
    from svdconvert.methods.statistics import ModuleStatistics


class Store(Protocol):
    """Where decompositions go."""

    def has(self, target: Target) -> bool:
        """Whether a target is done."""
        ...

    def save(
        self, target: Target, found: Decomposition, inner: Metric, outer: Metric, outputs: torch.Tensor | None
    ) -> None:
        """Take one target's decomposition; it is valid until the next one.

        Args:
            target: a matrix; a group only where it has no metrics.
            found: its decomposition.
            inner: metric on the smaller side.
            outer: metric on the longer side.
            outputs: :func:`svdconvert.linalg.output_losses.output_losses`, or None where the inputs are not known.
        """
        ...


def kept_decompositions(
    source: Source,
    targets: Sequence[Target],
    method: Method,
    options: Mapping[str, float],
    knowledge: Knowledge | None,
    folder: Path,
    device: str,
    events: Events,
    workers: int | None = None,
) -> Decompositions:
    """All targets' decompositions, those that a folder has already and the rest computed now.

    Args:
        source, targets, method, options, events, workers: see :func:`decompose_targets`.
        knowledge: gives the statistics; None for methods without any.
        folder: keeps the decompositions and what the statistics need meanwhile.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: see :func:`decompose_targets`, or the folder is of other settings.
    """
    key = decompositions_key(source, method, options, knowledge, device)
    with current().leader_first():
        store = Decompositions(folder / "decompositions", key)
    decompose_all(source, targets, method, options, knowledge, store, folder / "statistics", device, events, workers)
    return store


def decompose_all(
    source: Source,
    targets: Sequence[Target],
    method: Method,
    options: Mapping[str, float],
    knowledge: Knowledge | None,
    store: Store,
    work: Path,
    device: str,
    events: Events,
    workers: int | None = None,
) -> None:
    """:func:`decompose_targets`, with statistics that are collected as they are needed, in the folder ``work``."""
    statistics = None
    if knowledge is not None and method.statistics:
        count = knowledge.text.tokens
        events.note(f"calibration on {count:,} tokens of {knowledge.name}")
        widest = max(max(part.rows, target.shape[1]) for target in targets for part in target.parts)
        if count < widest:
            few = f"{count:,} tokens, fewer than the {widest:,} channels of the widest layer, make the metrics singular"
            events.note(Sentence(f"{few}; raise {asked('calibration.samples')} for better factors"))
        modules = [part.module for target in targets for part in target.parts]
        statistics = knowledge.collect(method, modules, device, work, events)
    decompose_targets(source, targets, method, options, store, statistics, torch.device(device), events, workers)


def decompose_targets(
    source: Source,
    targets: Sequence[Target],
    method: Method,
    options: Mapping[str, Any],
    store: Store,
    statistics: StatisticsProvider | None,
    device: torch.device,
    events: Events,
    workers: int | None = None,
) -> None:
    """Compute what is missing in a collection; of several processes each does its share, block by block.

    Args:
        source: the dense model.
        targets: all targets.
        method, options: how their metrics are made.
        store: where the results go.
        statistics: gives the statistics of block after block; None for methods without any.
        device: what computes.
        events: receiver of progress.
        workers: matrices of a block in work at the same time; None: one a core on the CPU, as far as memory goes.

    Raises:
        InputError: a matrix or a statistic has NaN or infinite entries; it is named.
    """
    group, tensors = current(), target_tensors(source, targets)
    known = group.share({target.module for target in targets if store.has(target)})
    missing = [target for target in targets if target.module not in known]
    done = len(targets) - len(missing)
    parts: dict[int, list[Target]] = {}
    for target in missing:  # without statistics there is no need to go block by block
        parts.setdefault(layer_number(target.module) if statistics else 0, []).append(target)
    mine = {
        block: split(part, group.size, lambda target: matrix_cost(target.shape))[group.rank]
        for block, part in parts.items()
    }
    events.begin([_announcement(tensors, target) for part in mine.values() for target in part], done)
    if not missing:
        return
    memory = partial(_memory, missing, statistics is not None)
    # on a GPU, torch's solver has a workspace of its own, and so have products of metrics
    count = min(workers or usual_workers(str(device), memory, lambda n: 3 * memory(n)), len(missing))
    lanes = lanes_of(device)
    reading = threading.Lock()  # so that no two of them fetch the same file
    hands = [_Worker(source, tensors, method, options, store, lanes, events, reading) for _ in range(count)]
    worker = hands[0]
    try:
        if statistics is None:
            in_threads((partial(_Worker.run, target=target) for target in mine[0]), hands)
        else:
            own = {target.module for part in mine.values() for target in part}
            for target in missing:
                if target.module in own:
                    worker.finish_group(target)
            group.wait()
            needed = group.share(_needed(missing, store, worker))
            by_block: dict[int, list[tuple[Target, int]]] = {}
            for target in missing:
                for index, part in enumerate(target.parts):
                    if (target.module, index) in needed:
                        by_block.setdefault(layer_number(part.module), []).append((target, index))
            every = {layer_number(part.module) for target in targets for part in target.parts}
            for block, found in statistics(skip_blocks=every - by_block.keys()) if by_block else ():
                here = [(target, index) for target, index in by_block.get(block, []) if target.module in own]
                # The largest first, so that no one waits for it alone at the end.
                here.sort(key=lambda item: -matrix_cost(item[0].shape))
                jobs = [
                    partial(_Worker.learn, target=target, index=index, statistics=found[target.parts[index].module])
                    for target, index in here
                ]
                in_threads(jobs, hands)
                del found, jobs  # one block's Gram matrices at a time
                for target, _ in here:
                    worker.finish_group(target)
    finally:
        for hand in hands:
            hand.reader.close()
    group.wait()


def _memory(targets: Sequence[Target], calibrated: bool, workers: int) -> int:
    """Bytes that so many matrices need at the same time: three copies of the larger Gram matrix in float64 each."""
    sizes = (max(target.shape) if calibrated else min(target.shape) for target in targets)
    return workers * 3 * 8 * max(sizes) ** 2


def _needed(missing: Sequence[Target], store: Store, worker: _Worker) -> set[tuple[str, int]]:
    """Layers whose statistics are needed, as targets and places within their groups."""
    return {
        (target.module, index)
        for target in missing
        for index in range(len(target.parts))
        if not store.has(target) and not (target.followers and worker.groups.is_waiting(target, index))
    }


class _Worker:
    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, TensorInfo],
        method: Method,
        options: Mapping[str, Any],
        store: Store,
        lanes: Lanes,
        events: Events,
        reading: threading.Lock,
    ) -> None:
        self.source, self.tensors, self.method, self.options, self.store = source, tensors, method, options, store
        self.device, self.lane, self.events = lanes.device, lanes.worker(), events
        self.reader, self.workspace, self.reading = WeightReader(source), Workspace(), reading

    @property
    def groups(self) -> Decompositions:
        """The store, where metrics of groups can wait."""
        assert isinstance(self.store, Decompositions)
        return self.store

    def run(self, target: Target) -> None:
        """Decompose a target without metrics."""
        self.events.solving(_announcement(self.tensors, target))
        with self.lane:
            weights = self.weights(target)
            for part, weight in zip(target.parts, weights, strict=True):
                with _naming(part.weight):
                    check_entries(weight)
            stack = torch.cat(weights) if target.followers else weights[0]
            self.source.refuse_changed()
            self.store.save(target, decompose(stack, self.workspace), None, None, None)
        self.events.decomposed(_announcement(self.tensors, target))

    def learn(self, target: Target, index: int, statistics: ModuleStatistics) -> None:
        """Decompose a target in its metrics; of a group, keep what has to be known of one layer."""
        with self.lane:
            self._learn(target, index, statistics)

    def _learn(self, target: Target, index: int, statistics: ModuleStatistics) -> None:
        self.events.solving(_announcement(self.tensors, target))
        part, tall = target.parts[index], target.shape[0] >= target.shape[1]
        weight = self.weights(target, index)[0]
        left, right = self.method.metrics(statistics, self.options)
        gram = statistics.input_gram
        own = gram is right  # no shrinkage
        left, right = _on(left, self.device), _on(right, self.device)
        if any(side is not None and not bool(side.any()) for side in (left, right)):
            self.events.note(
                f"the statistics of {part.weight} on the calibration text are all zero, so it is factored by plain SVD"
            )
        with _naming(part.weight):
            if not target.followers:
                found = decompose(weight, self.workspace, left, right)
                gram = right if own else _on(gram, self.device)
                outputs = None if gram is None else output_losses(weight, found, left, right, gram)
                inner, outer = (right, left) if tall else (left, right)
                self.source.refuse_changed()
                self.store.save(target, found, inner, outer, outputs)
                self.events.decomposed(_announcement(self.tensors, target))
                return
            outer = outer_statistic(weight, left, tall=tall)
        assert right is not None  # every method that looks at a text has a metric on the inputs
        store, amount = self.groups, float(self.options.get("shrinkage", 0.0))
        self.source.refuse_changed()
        # how to have the second moment again
        known = {"shrinkage": torch.tensor(amount, dtype=torch.float64)} if gram is not None and amount < 1 else {}
        write_tensors(store.metric_path(target, index), {"metric": right, **known})
        waiting = {"tokens": torch.tensor(statistics.tokens)} | ({} if outer is None else {"outer": outer})
        write_tensors(store.waiting_path(target, index), waiting)

    def finish_group(self, target: Target) -> None:
        """Decompose a group if all its layers are known."""
        if not target.followers or not all(self.groups.is_waiting(target, i) for i in range(len(target.parts))):
            return
        places = [self.groups.waiting_path(target, index) for index in range(len(target.parts))]
        wide = target.shape[0] < target.shape[1]

        def outer(place: Path) -> Metric:
            return _on(read_tensors(place, (), optional=("outer",)).get("outer"), self.device)

        with self.lane:
            found = decompose_shared(
                [partial(outer, place) for place in places],
                [partial(load_metric, self.groups.metric_path(target, i), self.device) for i in range(len(places))],
                [_tokens(place) for place in places],
                self.weights(target) if wide else None,
                self.workspace,
            )
            self.groups.save_group(target, found)
        self.events.decomposed(_announcement(self.tensors, target))

    def weights(self, target: Target, index: int | None = None) -> list[Tensor]:
        """Matrices of a target, or one of them; valid until the next call."""
        infos = [self.tensors[part.weight] for part in target.parts]
        infos = infos if index is None else infos[index : index + 1]
        buffer = self.workspace.take("weight", (sum(i.nbytes for i in infos),), torch.uint8, torch.device("cpu"))
        found, start = [], 0
        for info in infos:
            with self.reading:
                weight = self.reader.read(info, buffer[start:]).to(self.device)
            found.append(weight.T if target.transposed else weight)
            start += info.nbytes
        return found


def _tokens(path: Path) -> int:
    return int(read_tensors(path, ("tokens",))["tokens"])


@contextmanager
def _naming(weight: str) -> Iterator[None]:
    """Say which tensor an InputError is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"tensor {weight} cannot be converted: {error.sentence.marked}") from None


def _on(metric: Metric, device: torch.device) -> Metric:
    return None if metric is None else metric.to(device)


def _announcement(tensors: Mapping[str, TensorInfo], target: Target) -> Step:
    """A step for the progress display."""
    return Step("decompose", target.weight, tuple(tensors[part.weight] for part in target.parts), ())
