"""Running a model forward block by block, as it is or with some of its weights replaced, and its loss at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import svdconvert
from svdconvert.activations import ActivationStore, Loss, check_room, read_into
from svdconvert.blocks import ModelBlocks
from svdconvert.compute import stored_product
from svdconvert.corpus import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.events import Events
from svdconvert.head import next_token_loss
from svdconvert.headers import read_header
from svdconvert.names import layer_number, suffix
from svdconvert.source import Source
from svdconvert.weights import torch_dtype

# path within a block -> its matrix [out, in], of any floating type
Weights = Mapping[str, Tensor]


class Stream:
    """Hidden states of some sequences on their way through the blocks; those between two blocks are a file.

    Attributes:
        batches: slices of the sequences that are run at a time.
    """

    def __init__(
        self,
        blocks: ModelBlocks,
        ids: Tensor,
        mask: Tensor,
        folder: Path,
        key: Mapping[str, Any],
        *,
        name: str,
        batch_size: int,
    ) -> None:
        """Prepare.

        Args:
            blocks: the dense model.
            ids, mask: [N, length], int64 and bool; False is padding.
            folder: where the files are.
            key: what they depend on, in JSON types; files of another key are given up.
            name: what is run, for messages: ``the compressed model``.
            batch_size: sequences at a time.
        """
        self._blocks, self._ids, self._mask, self._name = blocks, ids, mask, name
        self.batches = [slice(i, min(i + batch_size, len(ids))) for i in range(0, len(ids), batch_size)]
        whole = {
            **key,
            "sequences": len(ids),
            "batch_size": batch_size,
            "dtype": str(blocks.dtype),
            "device": blocks.device.type,
            "code": [svdconvert.__version__, torch.__version__],
        }
        self.store = ActivationStore(folder, whole, (*ids.shape, blocks.hidden_size), blocks.dtype)

    def has(self, index: int) -> bool:
        """Whether the input of a block is there; that of block ``count`` is the head's."""
        return self.store.has(f"hidden-{index}")

    def read(self, index: int, batch: slice) -> Tensor:
        """Input of a block: [batch, length, hidden] on the device."""
        return self.store.read(f"hidden-{index}", batch).to(self._blocks.device)

    def embed(self) -> None:
        """Make the first block's input; the embeddings' weights have to be there."""
        with self.store.writing("hidden-0") as write, torch.no_grad():
            for batch in self.batches:
                hidden = self._blocks.embed(self._ids[batch], self._mask[batch])
                self._check(hidden, f"the embeddings of {self._name} give")
                write(hidden)

    def run(self, block: nn.Module, index: int, batch: slice) -> Tensor:
        """A block's output for one batch."""
        output = self._blocks.run(block, self.read(index, batch), self._mask[batch])
        self._check(output, f"block {index} of {self._name} gives")
        return output

    def step(self, block: nn.Module, index: int) -> None:
        """From the input of a block to that of the next one."""
        with self.store.writing(f"hidden-{index + 1}") as write, torch.no_grad():
            for batch in self.batches:
                write(self.run(block, index, batch))

    def forget(self, index: int) -> None:
        """Give the input of a block up."""
        self.store.remove(f"hidden-{index}")

    def tokens(self, values: Tensor, batch: slice) -> Tensor:
        """[batch, length, n] or [batch * length, n] -> [tokens that are no padding, n]."""
        return values.reshape(-1, values.shape[-1])[self._mask[batch].reshape(-1).to(values.device)]

    def loss(self, head: nn.Module) -> Loss:
        """Loss of the sequences, from the last block's output."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.batches:
                nll, predicted, _ = next_token_loss(
                    head,
                    self.read(self._blocks.count, batch),
                    self._ids[batch],
                    self._mask[batch],
                    vocabulary=self._blocks.vocabulary,
                    check=lambda logits: self._check(logits, f"the head of {self._name} gives"),
                )
                total, count = total + nll, count + predicted
        return Loss(total, count)

    def _check(self, values: Tensor, what: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{what} NaN or infinite activations on the calibration text; check the source model")


class StoredMatrices:
    """The products of factors in weight files, a block's at a time."""

    def __init__(self, files: Sequence[Path], factors: Mapping[str, Sequence[str]]) -> None:
        """Find the factors.

        Args:
            files: weight files in safetensors format.
            factors: module path -> names of its tensors, in the order of its layout.
        """
        self._infos = {info.name: (path, info) for path in files for info in read_header(path)}
        self._factors: dict[int, dict[str, Sequence[str]]] = {}
        for module, names in factors.items():
            self._factors.setdefault(layer_number(module), {})[suffix(module)] = names

    def __call__(self, index: int) -> Weights:
        """The products of one block, float64."""
        found = self._factors.get(index, {})
        return {path: stored_product([self._read(name) for name in names]) for path, names in found.items()}

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
