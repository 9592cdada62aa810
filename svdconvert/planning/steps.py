"""A job as data: the tensors it reads, the operations, and the files it writes. No torch, no tensor data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from svdconvert.families.table import Architecture
from svdconvert.names import natural
from svdconvert.storage.headers import file_layout
from svdconvert.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Step:
    """A unit of work that is done as a whole or not at all.

    Attributes:
        kind: a row of :data:`svdconvert.factoring.operations.OPERATIONS`, or ``copy``.
        key: unique name of the step in journals and reports.
        inputs: tensors of the source.
        outputs: tensors that it writes, in the order in which the operation returns them.
        options: arguments of the operation, in JSON types.
    """

    kind: str
    key: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> frozenset[str]:
        """Source files that the step reads."""
        return frozenset(info.file for info in self.inputs)


def in_order(steps: Iterable[Step]) -> list[Step]:
    """Steps by where the last tensor of each is read."""
    return sorted(steps, key=lambda step: (*max((info.file, info.start) for info in step.inputs), natural(step.key)))


def files_here(steps: Sequence[Step]) -> int:
    """Number of files of a Hub source that are needed at a time, for steps in this order.

    The file in use and the one being fetched; more where steps read several files, which all have to stay until then.
    """
    last = {file: number for number, step in enumerate(steps) for file in step.files}
    needed: set[str] = set()
    most = 2
    for number, step in enumerate(steps):
        needed |= step.files
        most = max(most, len(needed))
        needed = {file for file in needed if last[file] > number}
    return most


def shard(outputs: Iterable[TensorInfo], max_shard_bytes: int) -> dict[str, list[TensorInfo]]:
    """Distribute tensors over weight files in the order given, as Hugging Face names them.

    A file is closed before the tensor that would make it too large; a tensor that is larger by itself gets a file of
    its own.

    Returns:
        File name -> its tensors.
    """
    groups: list[list[TensorInfo]] = [[]]
    room = max_shard_bytes
    for info in outputs:
        if groups[-1] and info.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(info)
        room -= info.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def index_json(shards: Mapping[str, Sequence[TensorInfo]]) -> dict[str, Any] | None:
    """The ``model.safetensors.index.json`` of a sharded checkpoint; None for a single file."""
    if len(shards) == 1:
        return None
    weight_map = {info.name: file for file, infos in shards.items() for info in infos}
    total = sum(info.nbytes for infos in shards.values() for info in infos)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def files_bytes(shards: Mapping[str, Sequence[TensorInfo]]) -> int:
    """Bytes of all weight files, headers included."""
    return sum(file_layout(infos).size for infos in shards.values())


def with_copies(step: Step, copies: Sequence[TensorInfo], row: Architecture) -> Step:
    """A step that copies the embedding, with the tensors beside it that have to be equal to it."""
    if not copies or step.kind != "copy" or step.outputs[0].name != row.embedding:
        return step
    return replace(step, inputs=(*step.inputs, *copies))
