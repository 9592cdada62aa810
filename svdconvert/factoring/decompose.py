"""Decomposing every target of a model, block by block, in several threads and processes.

What becomes of the results is up to a :class:`svdconvert.factoring.stores.Store`;
:mod:`svdconvert.factoring.decompositions` keeps them in files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdconvert.factoring.decomposer import Decomposer, Task, announcement
from svdconvert.factoring.decompositions import Decompositions, decompositions_key
from svdconvert.factoring.stores import GroupStore, Store
from svdconvert.linalg.rates import has_slow_float64
from svdconvert.machine.lanes import lanes_of
from svdconvert.machine.memory import give_memory_back
from svdconvert.machine.processes import current
from svdconvert.machine.products import multiplied_by
from svdconvert.machine.threads import in_threads, usual_workers
from svdconvert.methods.table import Method, is_shrunk
from svdconvert.names import layer_number
from svdconvert.planning.events import Events
from svdconvert.planning.memory import decomposition_bytes
from svdconvert.planning.partition import matrix_cost, split
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import target_tensors
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.text import Stats
from svdconvert.storage.source import Source

if TYPE_CHECKING:
    from svdconvert.calibration.knowledge import Knowledge, StatisticsProvider

# A layer of a target: the target, and its place among the target's parts.
_Layer = tuple[Target, int]


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
    *,
    whole: bool = False,
) -> Decompositions:
    """All targets' decompositions, those that a folder has already and the rest computed now.

    Args:
        source, targets, method, options, events, workers: see :func:`decompose_targets`.
        knowledge: gives the statistics; None for methods without any.
        folder: keeps the decompositions and what the statistics need meanwhile.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        whole: whether both metrics of a matrix are kept whole, see :class:`Decompositions`.

    Raises:
        InputError: see :func:`decompose_targets`, or the folder is of other settings.
    """
    key = decompositions_key(source, method, options, knowledge, device)
    with current().leader_first():
        arithmetic = arithmetic_of(method, options, knowledge, device)
        store = Decompositions(folder / "decompositions", key, whole=whole, arithmetic=arithmetic)
    work = folder / "statistics"
    decompose_all(source, targets, method, options, knowledge, store, work, device, events, workers, groups=store)
    return store


def arithmetic_of(method: Method, options: Mapping[str, float], knowledge: Knowledge | None, device: str) -> str:
    """How metrics are computed here, in one line; empty without metrics, or where that is float64 as always.

    Args:
        method, options, knowledge, device: see :func:`kept_decompositions`.
    """
    told: list[str] = []
    if not method.statistics or knowledge is None:
        return ""
    if not isinstance(knowledge.repeatable, Stats):
        ways = "float32 products, of massive tokens float64" if is_shrunk(options) else "float64 products"
        told.append(f"float32 passes by {multiplied_by(device.split(':')[0])}; second moments from {ways}")
    if has_slow_float64(torch.device(device)):  # no figure: it is another one in every run, and the record is not
        told.append("metrics in float32 and slices of it, as float64 is slow here")
    return "; ".join(told)


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
    groups: GroupStore | None = None,
) -> None:
    """:func:`decompose_targets`, with statistics that are collected as they are needed, in the folder ``work``."""
    statistics = None
    if knowledge is not None and method.statistics:
        count = knowledge.text.tokens
        events.note(f"calibration on {count:,} tokens of {knowledge.name}")
        widest = max(max(part.rows, target.shape[1]) for target in targets for part in target.parts)
        if count < widest:
            few = f"{count:,} tokens, fewer than the {widest:,} channels of the widest layer, make the metrics singular"
            events.note(Sentence(f"{few}; collect from more text ({asked('calibration.samples')}) for better factors"))
        modules = [part.module for target in targets for part in target.parts]
        statistics = knowledge.collect(method, modules, device, work, events, not is_shrunk(options))
    decompose_targets(
        source, targets, method, options, store, statistics, torch.device(device), events, workers, groups
    )


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
    groups: GroupStore | None = None,
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
        groups: keeps statistics of layers that share a factor until their group is known; needed where targets are
            such groups and the method has statistics.

    Raises:
        InputError: a matrix or a statistic has NaN or infinite entries; it is named.
    """
    task = Task(
        source=source,
        tensors=target_tensors(source, targets),
        method=method,
        options=options,
        store=store,
        groups=groups,
        lanes=lanes_of(device),
        events=events,
        reading=threading.Lock(),
    )
    process_group = current()
    done = process_group.share({target.module for target in targets if store.has(target)})
    missing = [target for target in targets if target.module not in done]
    mine = _share_of_this_process(missing, by_block=statistics is not None)
    events.begin([announcement(task.tensors, target) for target in mine], len(targets) - len(missing))
    if not missing:
        return
    workers = min(workers or _usual_workers(missing, device, calibrated=statistics is not None), len(missing))
    with ExitStack() as stack:
        decomposers = [stack.enter_context(Decomposer(task)) for _ in range(workers)]
        if statistics is None:
            in_threads((partial(Decomposer.plain, target=target) for target in mine), decomposers)
        else:
            _block_by_block(task, targets, missing, mine, statistics, decomposers)
    give_memory_back()
    process_group.wait()


def _share_of_this_process(missing: Sequence[Target], *, by_block: bool) -> list[Target]:
    """Targets that are this process's to decompose; each process has its share of every block, or of all at once."""
    group = current()
    blocks: dict[int, list[Target]] = {}
    for target in missing:
        blocks.setdefault(layer_number(target.module) if by_block else 0, []).append(target)
    shares = [split(block, group.size, lambda target: matrix_cost(target.shape)) for block in blocks.values()]
    return [target for share in shares for target in share[group.rank]]


def _usual_workers(targets: Sequence[Target], device: torch.device, *, calibrated: bool) -> int:
    """As many matrices at a time as cores and memory allow."""
    sides = [
        max(target.shape[1], *(part.rows for part in target.parts)) if calibrated else min(target.shape)
        for target in targets
    ]
    return usual_workers(
        str(device), partial(decomposition_bytes, sides), partial(decomposition_bytes, sides, on_gpu=True)
    )


def _block_by_block(
    task: Task,
    targets: Sequence[Target],
    missing: Sequence[Target],
    mine: Sequence[Target],
    statistics: StatisticsProvider,
    decomposers: Sequence[Decomposer],
) -> None:
    """Decompose targets in their metrics, as the statistics of block after block come.

    Args:
        task: what the decomposers have in common.
        targets: all targets.
        missing: those that no process has done.
        mine: those of them that are this process's.
        statistics: gives the statistics of block after block.
        decomposers: one for each thread.
    """
    group, own = current(), {target.module for target in mine}
    for target in missing:  # what an earlier run has left at the last moment
        if target.module in own:
            _finish_group(task, target, decomposers[0])
    group.wait()
    needed = group.share({(target.module, index) for target, index in _needed(task, missing)})
    by_block: dict[int, list[_Layer]] = {}
    for target in missing:
        for index, part in enumerate(target.parts):
            if (target.module, index) in needed:
                by_block.setdefault(layer_number(part.module), []).append((target, index))
    every = {layer_number(part.module) for target in targets for part in target.parts}
    for block, modules in statistics(skip_blocks=every - by_block.keys()) if by_block else ():
        # a block with many experts comes in several parts
        layers = [
            (target, index)
            for target, index in by_block.get(block, [])
            if target.module in own and target.parts[index].module in modules
        ]
        # The largest first, so that no one waits for it alone at the end.
        layers.sort(key=lambda layer: -matrix_cost(layer[0].shape))
        jobs = [
            partial(Decomposer.layer, target=target, index=index, statistics=modules[target.parts[index].module])
            if target.followers
            else partial(Decomposer.matrix, target=target, statistics=modules[target.module])
            for target, index in layers
        ]
        in_threads(jobs, decomposers)
        del modules, jobs  # one block's Gram matrices at a time
        for target, _ in layers:
            _finish_group(task, target, decomposers[0])
        for decomposer in decomposers:
            decomposer.rest()  # the model's next block is run meanwhile


def _needed(task: Task, missing: Sequence[Target]) -> Iterator[_Layer]:
    """Layers whose statistics are needed."""
    for target in missing:
        for index in range(len(target.parts)):
            if not task.store.has(target) and not _has_layer(task, target, index):
                yield target, index


def _has_layer(task: Task, target: Target, index: int) -> bool:
    """Whether all that has to be known of a layer of a group is there."""
    return bool(target.followers) and task.groups is not None and task.groups.has_layer(target, index)


def _finish_group(task: Task, target: Target, decomposer: Decomposer) -> None:
    """Decompose a group if all its layers are known."""
    if target.followers and all(_has_layer(task, target, index) for index in range(len(target.parts))):
        decomposer.group(target)
