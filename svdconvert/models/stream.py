"""Hidden states on their way through a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.errors import InputError
from svdconvert.linalg.precision import is_finite
from svdconvert.machine.products import multiplied_by
from svdconvert.models.activations import ActivationStore, Loss
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.head import Head
from svdconvert.models.head_divergence import HeadDivergence, head_divergence
from svdconvert.models.loss import head_batches, next_token_loss
from svdconvert.version import __version__

# path within a block -> its matrix [out, in], of any floating type
Weights = Mapping[str, Tensor]


class Stream:
    """Hidden states of some sequences on their way through the blocks, kept in a file between two blocks.

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
            key: what they depend on, in JSON types; files of another key are removed.
            name: of the model, for messages: ``the compressed model``.
            batch_size: sequences at a time.
        """
        self._blocks, self._ids, self._mask, self._name = blocks, ids, mask, name
        self.batches = [slice(i, min(i + batch_size, len(ids))) for i in range(0, len(ids), batch_size)]
        whole = {
            "key": dict(key),  # apart: a name of its own here must not hide one there
            "sequences": len(ids),
            "batch_size": batch_size,
            "dtype": str(blocks.dtype),
            "device": blocks.device.type,
            "code": [__version__, torch.__version__, multiplied_by(blocks.device.type)],
        }
        self.store = ActivationStore(folder, whole, (*ids.shape, blocks.hidden_size), blocks.dtype)

    def has(self, index: int) -> bool:
        """Whether the input of a block is there; the input of block ``count`` is the head's."""
        return self.store.has(f"hidden-{index}")

    def read(self, index: int, batch: slice) -> Tensor:
        """Input of a block: [batch, length, hidden] on the device."""
        return self.store.read(f"hidden-{index}", batch).to(self._blocks.device)

    def embed(self) -> None:
        """Make the first block's input."""
        with self.store.writing("hidden-0") as write, torch.no_grad():
            for batch in self.batches:
                hidden = self._blocks.embed(self._ids[batch], self._mask[batch])
                self._check(hidden, f"the embeddings of {self._name} give")
                write(hidden)

    def begin(self) -> int:
        """The last block whose input is there; the first one's is made if there is none."""
        ready = [index for index in range(self._blocks.count + 1) if self.has(index)]
        if ready:
            return ready[-1]
        self.embed()
        return 0

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

    def differentiate(self, block: nn.Module, index: int, batch: slice, gradient: Tensor) -> Tensor:
        """The gradient with respect to a block's input, from that with respect to its output."""
        hidden = self.read(index, batch).requires_grad_()
        with torch.enable_grad():
            output = self._blocks.run(block, hidden, self._mask[batch])
        torch.autograd.backward(output, gradient)
        assert hidden.grad is not None
        self._check(hidden.grad, f"block {index} of {self._name} gives", "gradients")
        return hidden.grad

    def forget(self, index: int) -> None:
        """Remove the input of a block."""
        self.store.remove(f"hidden-{index}")

    def tokens(self, values: Tensor, batch: slice) -> Tensor:
        """[batch, length, n] or [batch * length, n] -> [tokens without padding, n]."""
        return values.reshape(-1, values.shape[-1])[self._mask[batch].reshape(-1).to(values.device)]

    def counted(self, tokens: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
        """Which rows of an expert's layer are no padding, ordered by token, and their tokens; both [n].

        Args:
            tokens: position in the flattened batch of each row.
            batch: sequences.
        """
        order = tokens.argsort()
        kept = self._mask[batch].reshape(-1).to(tokens.device)[tokens[order]]
        return order[kept], tokens[order][kept]

    def loss(self, head: Head) -> Loss:
        """Loss of the sequences, from the last block's output."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self._for(head):
                nll, predicted, _ = next_token_loss(
                    head,
                    self.read(self._blocks.count, batch),
                    self._ids[batch],
                    self._mask[batch],
                    check=lambda logits: self._check(logits, f"the head of {self._name} gives"),
                )
                total, count = total + nll, count + predicted
        return Loss(total, count)

    def slopes(self, head: Head, draws: Tensor, write: Callable[[Tensor], None]) -> None:
        """The gradient of the loss of labels that are drawn from the model, with respect to the last block's outputs.

        Args:
            head: of the model.
            draws: [N, length] uniform numbers, float64.
            write: takes the gradient of the sum over all tokens, batch by batch.
        """
        for batch in self._for(head):
            _, _, slope = next_token_loss(
                head,
                self.read(self._blocks.count, batch),
                self._ids[batch],
                self._mask[batch],
                check=lambda logits: self._check(logits, f"the head of {self._name} gives"),
                draws=draws[batch],
                gradient=True,
            )
            write(slope)

    def divergence(
        self, head: Head, reference: Stream, write: Callable[[Tensor], None] | None = None
    ) -> HeadDivergence:
        """How far the predictions are from those of another model, from the last block's outputs of both.

        Args:
            head: of both models.
            reference: the other model's hidden states, of the same sequences.
            write: takes the gradient of the sum of KL with respect to these hidden states, batch by batch.
        """
        sums, count = HeadDivergence(), self._blocks.count
        for batch in self._for(head):
            found, slope = head_divergence(
                head,
                reference.read(count, batch),
                self.read(count, batch),
                self._ids[batch],
                self._mask[batch],
                check=lambda logits: self._check(logits, f"the head of {self._name} gives"),
                gradient=write is not None,
            )
            sums += found
            if write is not None:
                write(slope)
        return sums

    def _for(self, head: Head) -> Sequence[slice]:
        """The sequences that its head is run on at a time."""
        return head_batches(self.batches, self._ids.shape[1], head)

    def _check(self, values: Tensor, what: str, kind: str = "activations") -> None:
        if not is_finite(values):
            raise InputError(f"{what} NaN or infinite {kind} on the calibration text; check the source model")
