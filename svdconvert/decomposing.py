"""The decomposition of every target, computed once and kept as files: another rank or budget is then a small job.

Per target there is one file with the squared singular values, the directions, the metric that the least-squares
partner needs, and, where the inputs' second moments are known, the outputs' error at every rank: 12 k^2 bytes for a
matrix whose smaller side is k. A file that is there is finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from svdconvert.checkpoint import versions
from svdconvert.errors import InputError
from svdconvert.events import Events
from svdconvert.headers import TensorInfo
from svdconvert.metrics import Method
from svdconvert.planning import layer_number
from svdconvert.ranks import Target
from svdconvert.solver import Decomposition, Metric, Workspace, decompose, output_losses
from svdconvert.source import Source, read_json
from svdconvert.steps import Step
from svdconvert.weights import WeightReader
from svdconvert.writer import atomic_write, disk_errors

if TYPE_CHECKING:
    from svdconvert.calibrating import Knowledge, StatisticsProvider
    from svdconvert.calibration import ModuleStatistics


class Store(Protocol):
    """Where decompositions go."""

    def has(self, module: str) -> bool:
        """Whether a target is done."""
        ...

    def save(self, module: str, found: Decomposition, inner: Metric, outputs: torch.Tensor | None) -> None:
        """Take one target's decomposition; it is valid until the next one.

        Args:
            module: the target.
            found: its decomposition.
            inner: metric on the smaller side.
            outputs: :func:`svdconvert.solver.output_losses`, or None where the inputs are not known.
        """
        ...


class Decompositions:
    """Files of one model under one method, in a folder of their own."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Open or begin a collection.

        Args:
            folder: where the files are.
            key: everything that they depend on, in JSON types.

        Raises:
            InputError: the folder holds the decompositions of something else; the field that differs is named.
        """
        self.folder = folder
        found = folder / "key.json"
        wanted = json.loads(json.dumps(key))
        if found.is_file():
            theirs = read_json(found, "")
            for field in dict.fromkeys([*wanted, *theirs]):
                if wanted.get(field) != theirs.get(field):
                    raise InputError(
                        f"{folder} was computed with another {field.replace('_', ' ')} "
                        f"({theirs.get(field)}, now {wanted.get(field)}); give another --work folder"
                    )
            return
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(found, json.dumps(wanted, indent=1).encode())

    def path(self, module: str) -> Path:
        """File of one target."""
        return self.folder / f"{module}.safetensors"

    def has(self, module: str) -> bool:
        """Whether a target is done."""
        return self.path(module).is_file()

    def save(self, module: str, found: Decomposition, inner: Metric, outputs: torch.Tensor | None) -> None:
        """Write one target's file, whole or not at all; see :meth:`Store.save`."""
        tensors = {
            "values": found.values,
            # Half the room; what is lost is far below what the least-squares partner makes good.
            "basis": found.basis.float().contiguous(),
            "double": torch.tensor(found.basis.dtype == torch.float64),
            "scale": torch.tensor(found.scale, dtype=torch.float64),
        }
        if inner is not None:
            tensors["metric"] = inner
        if outputs is not None:
            tensors["outputs"] = outputs
        with disk_errors(self.folder):
            atomic_write(self.path(module), save({name: tensor.cpu() for name, tensor in tensors.items()}))

    def spectrum(self, module: str) -> torch.Tensor:
        """[k] float64, descending: squared singular values in the metrics."""
        with safe_open(self.path(module), "pt") as handle:
            values, scale = handle.get_tensor("values"), float(handle.get_tensor("scale"))
        return Decomposition(values, torch.empty(0), scale).spectrum

    def outputs(self, module: str) -> torch.Tensor | None:
        """[k + 1] float64: :func:`svdconvert.solver.output_losses`, or None where the inputs are not known."""
        return load_outputs(self.path(module))


def load_outputs(path: Path) -> torch.Tensor | None:
    """:meth:`Decompositions.outputs` of a target's file."""
    with safe_open(path, "pt") as handle:
        return handle.get_tensor("outputs") if "outputs" in handle.keys() else None  # noqa: SIM118 - no mapping


def load_decomposition(path: Path, device: torch.device) -> tuple[Decomposition, Metric]:
    """``(decomposition, metric on the smaller side)`` of a target's file."""
    tensors = load_file(path, device=str(device))
    basis = tensors["basis"].double() if bool(tensors["double"]) else tensors["basis"]
    found = Decomposition(tensors["values"], basis, float(tensors["scale"]))
    return found, tensors.get("metric")


def decompositions_key(
    source: Source, method: Method, options: Mapping[str, float], knowledge: Knowledge | None, device: str
) -> dict[str, Any]:
    """What decompositions depend on, in JSON types: the key of :class:`Decompositions`."""
    return {
        "svdconvert": versions()["svdconvert"],
        **source.identity(),
        "method": method.name,
        **options,
        **({} if knowledge is None else knowledge.key),
        "device": device.split(":")[0],
    }


def kept_decompositions(
    source: Source,
    targets: Sequence[Target],
    method: Method,
    options: Mapping[str, float],
    knowledge: Knowledge | None,
    folder: Path,
    device: str,
    events: Events,
) -> Decompositions:
    """All targets' decompositions, those that a folder has already and the rest computed now.

    Args:
        source, targets, method, options, events: see :func:`decompose_targets`.
        knowledge: gives the statistics; None for methods without any.
        folder: keeps the decompositions and what the statistics need meanwhile.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: see :func:`decompose_targets`, or the folder is of other settings.
    """
    store = Decompositions(folder / "decompositions", decompositions_key(source, method, options, knowledge, device))
    decompose_all(source, targets, method, options, knowledge, store, folder / "statistics", device, events)
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
) -> None:
    """:func:`decompose_targets`, with statistics that are collected as they are needed, in the folder ``work``."""
    statistics = None
    if knowledge is not None and method.statistics:
        count = knowledge.text.tokens
        events.note(f"calibration on {count:,} tokens of {knowledge.name}")
        widest = max(max(target.shape) for target in targets)
        if count < widest:
            events.note(
                f"{count:,} tokens are fewer than the {widest:,} channels of the widest layer, so that the metrics are "
                "singular; more --calib-samples give better factors"
            )
        modules = [target.module for target in targets]
        statistics = knowledge.collect(method, modules, device, work, events)
    decompose_targets(source, targets, method, options, store, statistics, torch.device(device), events)


def decompose_targets(
    source: Source,
    targets: Sequence[Target],
    method: Method,
    options: Mapping[str, Any],
    store: Store,
    statistics: StatisticsProvider | None,
    device: torch.device,
    events: Events,
) -> None:
    """Compute what is missing in a collection.

    Args:
        source: the dense model.
        targets: all targets.
        method, options: how their metrics are made.
        store: where the results go.
        statistics: gives the statistics of block after block; None for methods without any.
        device: what computes.
        events: receiver of progress.

    Raises:
        InputError: a matrix or a statistic has NaN or infinite entries; it is named.
    """
    missing = [target for target in targets if not store.has(target.module)]
    done = len(targets) - len(missing)
    events.begin([_announcement(source, target) for target in missing], done)
    if not missing:
        return
    worker = _Worker(source, method, options, store, device, events)
    try:
        if statistics is None:
            for target in missing:
                worker.run(target, None)
            return
        by_block: dict[int, list[Target]] = {}
        for target in missing:
            by_block.setdefault(layer_number(target.module), []).append(target)
        every = {layer_number(target.module) for target in targets}
        for block, found in statistics(skip_blocks=every - by_block.keys()):
            for target in by_block.get(block, []):
                worker.run(target, found[target.module])
            del found  # one block's Gram matrices at a time
    finally:
        worker.reader.close()


class _Worker:
    def __init__(
        self,
        source: Source,
        method: Method,
        options: Mapping[str, Any],
        store: Store,
        device: torch.device,
        events: Events,
    ) -> None:
        self.source, self.method, self.options, self.store = source, method, options, store
        self.device, self.events = device, events
        self.reader, self.workspace = WeightReader(source), Workspace()

    def run(self, target: Target, statistics: ModuleStatistics | None) -> None:
        step = _announcement(self.source, target)
        self.events.solving(step)
        info = self.source.tensors[target.weight]
        buffer = self.workspace.take("weight", (info.nbytes,), torch.uint8, torch.device("cpu"))
        weight = self.reader.read(info, buffer).to(self.device)
        weight = weight.T if target.transposed else weight
        left, right = (None, None) if statistics is None else self.method.metrics(statistics, self.options)
        gram = None if statistics is None else statistics.input_gram
        own = gram is right  # no shrinkage
        left, right = _on(left, self.device), _on(right, self.device)
        gram = right if own else _on(gram, self.device)
        try:
            found = decompose(weight, self.workspace, left, right)
        except InputError as error:
            raise InputError(f"tensor {target.weight} cannot be converted: {error}") from None
        outputs = None if gram is None else output_losses(weight, found, left, right, gram)
        self.store.save(target.module, found, right if target.shape[0] >= target.shape[1] else left, outputs)
        self.events.decomposed(step)


def _on(metric: Metric, device: torch.device) -> Metric:
    return None if metric is None else metric.to(device)


def _announcement(source: Source, target: Target) -> Step:
    """A step for the progress display."""
    info: TensorInfo = source.tensors[target.weight]
    return Step("decompose", target.weight, (info,), ())
