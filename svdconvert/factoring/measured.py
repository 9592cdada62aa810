"""Running a model forward block by block, as it is or with some of its weights replaced, and its loss at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svdconvert.calibration.grouping import reads_by_expert
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.layouts.row import Layout
from svdconvert.machine.memory import give_memory_back
from svdconvert.models.activations import Loss, check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream, Weights
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.storage.headers import read_header
from svdconvert.storage.packed import Packed, Place, unpacked
from svdconvert.storage.packed_data import PackedData
from svdconvert.storage.reader import as_bytes, torch_dtype
from svdconvert.storage.source import Source
from svdconvert.storage.whole import Whole
from svdconvert.tensors import TensorInfo


class StoredMatrices:
    """The matrices that weight files hold in place of a dense model's, a block's at a time."""

    def __init__(
        self,
        files: Sequence[Path],
        factors: Mapping[str, Sequence[str]],
        layout: Layout,
        config: Mapping[str, Any] = MappingProxyType({}),
        whole: Mapping[str, str] = MappingProxyType({}),
        model: Whole | None = None,
    ) -> None:
        """Find them.

        Args:
            files: weight files in safetensors format.
            factors: module path -> names of its tensors, in the order of its layout; packed ones by their weights.
            layout: how they are stored.
            config: config.json of the model that the files make up; it says which weights are packed.
            whole: module path -> name of its weight [out, in], of matrices that are no products.
            model: that sees, of whose language model they are.
        """
        self._layout, self._paths = layout, {path.name: path for path in files}
        self._packed: Mapping[Place, Packed] = {}
        tensors = {info.name: info for path in files for info in read_header(path)}
        self._tensors, packed = unpacked(tensors, config, "the result", self._pair, model)
        self._packed = {one.place: one for one in packed.values()}
        self._modules: dict[int, dict[str, Sequence[str]]] = {}
        for module, names in [*factors.items(), *((module, [name]) for module, name in whole.items())]:
            self._modules.setdefault(layer_number(module), {})[suffix(module)] = names
        self._whole = frozenset(whole.values())

    def __call__(self, index: int) -> Weights:
        """The matrices of one block, float64; each is read when it is asked for."""
        return _ReadWhenAsked(self._modules.get(index, {}), self._matrix)

    def _matrix(self, names: Sequence[str]) -> Tensor:
        stored = [self._read(self._tensors[name]) for name in names]
        return stored[0].double() if names[0] in self._whole else self._layout.product(stored)

    def _pair(self, info: TensorInfo) -> tuple[int, int]:
        first, second = self._read(info).tolist()
        return first, second

    def _read(self, info: TensorInfo) -> Tensor:
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        data = PackedData(self._paths.__getitem__, info.file, self._packed)
        try:
            data.fill(info, as_bytes(tensor), 0)
        finally:
            data.close()
        return tensor


class _ReadWhenAsked(Mapping[str, Tensor]):
    """Matrices by their paths, none of them kept."""

    def __init__(self, names: Mapping[str, Sequence[str]], read: Callable[[Sequence[str]], Tensor]) -> None:
        """Read nothing yet."""
        self._names, self._read = names, read

    def __getitem__(self, path: str) -> Tensor:
        """One of them."""
        return self._read(self._names[path])

    def __iter__(self) -> Iterator[str]:
        """Their paths."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


def measure_losses(
    source: Source,
    tokens: CalibrationTokens,
    matrices: Callable[[int], Weights],
    *,
    work: Path,
    device: str,
    batch_size: int,
    events: Events,
    known: Loss | None = None,
) -> tuple[Loss, Loss]:
    """Loss of a model as it is, and with some of its matrices replaced; one block is in memory at a time, and of large
    experts one with its matrices, which are then asked for in every batch.

    Args:
        source: the dense model.
        tokens: the text.
        matrices: block -> its other matrices.
        work: folder for hidden states, up to four blocks' worth; it is removed.
        device: where blocks are run.
        batch_size: sequences at a time.
        events: told the progress.
        known: the loss as it is, where it was measured before.

    Raises:
        InputError: something is NaN or infinite, or the disk is too small.
        JobError: reading or writing failed; the same call goes on.
    """
    give_memory_back()
    blocks = ModelBlocks(source, device=device)
    key = {"model": source.identity(), "tokens": tokens.digest}

    def stream(name: str, folder: str) -> Stream:
        return Stream(blocks, tokens.ids, tokens.mask, work / folder, key, name=name, batch_size=batch_size)

    other = stream("the compressed model", "compressed")
    # Two sets of hidden states at a time, of each.
    streams = [other] if known else [stream("the model", "dense"), other]
    check_room({each.store: 2 for each in streams})
    for each in streams:
        each.embed()
    for index in range(blocks.count):
        events.progress("measuring", index, blocks.count)
        with blocks.block(index, by_expert=reads_by_expert(blocks, index)) as block:
            for each in streams:
                with blocks.replaced(block, matrices(index) if each is other else {}):
                    each.step(block, index)
                each.forget(index)
    events.progress("measuring", blocks.count, blocks.count)
    give_memory_back()
    with blocks.head() as head:
        *dense, compressed = (each.loss(head) for each in streams)
    shutil.rmtree(work, ignore_errors=True)
    return known or dense[0], compressed
