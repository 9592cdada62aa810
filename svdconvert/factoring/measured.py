"""Running a model forward block by block, as it is or with some of its weights replaced, and its loss at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.layouts.row import Layout
from svdconvert.models.activations import Loss, check_room, read_into
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream, Weights
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.storage.headers import read_header
from svdconvert.storage.reader import torch_dtype
from svdconvert.storage.source import Source


class StoredMatrices:
    """The products of factors in weight files, a block's at a time."""

    def __init__(self, files: Sequence[Path], factors: Mapping[str, Sequence[str]], layout: Layout) -> None:
        """Find the factors.

        Args:
            files: weight files in safetensors format.
            factors: module path -> names of its tensors, in the order of its layout.
            layout: how they are stored.
        """
        self._infos = {info.name: (path, info) for path in files for info in read_header(path)}
        self._layout = layout
        self._factors: dict[int, dict[str, Sequence[str]]] = {}
        for module, names in factors.items():
            self._factors.setdefault(layer_number(module), {})[suffix(module)] = names

    def __call__(self, index: int) -> Weights:
        """The products of one block, float64."""
        factors = self._factors.get(index, {})
        return {path: self._layout.product([self._read(name) for name in names]) for path, names in factors.items()}

    def _read(self, name: str) -> Tensor:
        path, info = self._infos[name]
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        read_into(tensor, path, info.start)
        return tensor


def measure_losses(
    source: Source,
    tokens: CalibrationTokens,
    matrices: Callable[[int], Weights],
    *,
    work: Path,
    device: str,
    batch_size: int,
    events: Events,
) -> tuple[Loss, Loss]:
    """Loss of a model as it is, and with some of its matrices replaced; one block is in memory at a time.

    Args:
        source: the dense model.
        tokens: the text.
        matrices: block -> its other matrices.
        work: folder for hidden states, four blocks' worth; it is removed.
        device: where blocks are run.
        batch_size: sequences at a time.
        events: told the progress.

    Raises:
        InputError: something is NaN or infinite, or the disk is too small.
        JobError: reading or writing failed; the same call goes on.
    """
    blocks = ModelBlocks(source, device=device)
    key = {"model": source.identity(), "tokens": tokens.digest}

    def stream(name: str, folder: str) -> Stream:
        return Stream(blocks, tokens.ids, tokens.mask, work / folder, key, name=name, batch_size=batch_size)

    dense, other = stream("the model", "dense"), stream("the compressed model", "compressed")
    check_room([dense.store, other.store], 2)
    with blocks.embeddings():
        dense.embed()
        other.embed()
    for index in range(blocks.count):
        events.progress("measuring", index, blocks.count)
        with blocks.block(index) as block:
            dense.step(block, index)
            with blocks.replaced(block, matrices(index)):
                other.step(block, index)
        dense.forget(index)
        other.forget(index)
    events.progress("measuring", blocks.count, blocks.count)
    with blocks.head() as head:
        losses = dense.loss(head), other.loss(head)
    shutil.rmtree(work, ignore_errors=True)
    return losses
