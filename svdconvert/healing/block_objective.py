"""How far the outputs of one block are from the dense model's, and the gradient of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from svdconvert.healing.distance import distances
from svdconvert.healing.objective import Diverged
from svdconvert.healing.precision import computing
from svdconvert.healing.trained import Trained
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.head_divergence import HeadDivergence
from svdconvert.models.stream import Stream
from svdconvert.storage.source import Source


class BlockStates:
    """What goes into a block of the compressed model, and what comes out of the dense one's, of some sequences.

    Attributes:
        sequences: their numbers in the text, int64.
    """

    def __init__(self, sequences: Tensor, mask: Tensor, inputs: Stream, targets: Stream, index: int) -> None:
        """Prepare.

        Args:
            sequences: numbers of those of both streams, in their order.
            mask: of the whole text, [N, length], bool; False is padding.
            inputs: of the compressed model, at the block.
            targets: of the dense one, behind it.
            index: of the block.
        """
        self.sequences, self._mask, self._inputs, self._targets, self._index = sequences, mask, inputs, targets, index
        self._places = {int(number): place for place, number in enumerate(sequences)}

    def of(self, sequences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets, [n, length, hidden], and mask of n sequences, [n, length], on the device."""

        def read(stream: Stream, index: int) -> Tensor:
            places = (self._places[int(number)] for number in sequences)
            return torch.cat([stream.read(index, slice(place, place + 1)) for place in places])

        inputs = read(self._inputs, self._index)
        return inputs, read(self._targets, self._index + 1), self._mask[sequences].to(inputs.device)


class BlockObjective:
    """What is minimised: the mean over the tokens of ||y - y'||^2 / ||y||^2, of outputs y of the dense model's block.

    Attributes:
        student: the block's factors.
        precision: of the matrix products.
    """

    name: ClassVar[str] = "error"

    def __init__(
        self,
        blocks: ModelBlocks,
        block: nn.Module,
        student: Trained,
        mask: Tensor,
        batch_size: int,
        precision: torch.dtype,
    ) -> None:
        """Prepare.

        Args:
            blocks: the compressed model.
            block: of it, on the device.
            student: its factors.
            mask: of the whole text, [N, length], bool; False is padding.
            batch_size: sequences at a time.
            precision: of the matrix products.
        """
        self._blocks, self._block, self.student, self._mask = blocks, block, student, mask
        self._batch_size, self.precision = batch_size, precision

    def measure(self, known: BlockStates, sequences: Tensor, precision: torch.dtype | None = None) -> HeadDivergence:
        """The sum of errors, as ``kl``, and the number of tokens of some sequences.

        Raises:
            Diverged: the block gives no finite numbers.
        """
        total, count = 0.0, 0
        with torch.no_grad():
            for part in sequences.split(self._batch_size):
                errors = self._errors(known, part, precision or self.precision)
                total, count = total + float(errors.sum()), count + errors.numel()
        return HeadDivergence(kl=total, tokens=count)

    def differentiate(self, known: BlockStates, sequences: Tensor) -> float:
        """Add the gradient of the mean over the tokens of some sequences to the factors'.

        Returns:
            The mean.

        Raises:
            Diverged: the block gives no finite numbers.
        """
        count, total = int(self._mask[sequences].sum()), 0.0
        for part in sequences.split(self._batch_size):
            with torch.enable_grad():
                errors = self._errors(known, part, self.precision)
                torch.autograd.backward(errors.sum() / count)
            total += float(errors.detach().sum())
        return total / count

    def _errors(self, known: BlockStates, part: Tensor, precision: torch.dtype) -> Tensor:
        """Of all tokens that are no padding: [n], float32."""
        inputs, targets, mask = known.of(part)
        with computing(inputs.device, precision):
            outputs = self._blocks.run(self._block, inputs, self._mask[part])
        errors = distances(outputs[mask], targets[mask])
        if not bool(torch.isfinite(errors.detach()).all()):
            raise Diverged
        return errors


@contextmanager
def trained_block(blocks: ModelBlocks, index: int, source: Source, prefix: str) -> Iterator[tuple[nn.Module, Trained]]:
    """Have a block of the compressed model on the device, ready to be trained.

    Args:
        blocks: the compressed model.
        index: of the block.
        source: its checkpoint.
        prefix: of the block's tensors in it.
    """
    with blocks.block(index) as block:
        student = Trained(source, block, prefix)
        try:
            yield block, student
        finally:
            student.release()
