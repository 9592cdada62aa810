"""Hidden states of a refit: those of the dense, the truncated and the refitted model, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.models.activations import check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream

# One sequence of so many is held out.
HELD_OUT = 8


@dataclass(frozen=True)
class Halves:
    """One model's hidden states.

    Attributes:
        train: of the sequences that regressions see.
        held_out: of the others.
    """

    train: Stream
    held_out: Stream

    def __iter__(self) -> Iterator[Stream]:
        """Both, in that order."""
        return iter((self.train, self.held_out))


class RefitStreams:
    """All hidden states of a refit.

    Attributes:
        dense: of the dense model.
        refitted: of the model refitted so far.
        truncated: of the truncated model, held-out sequences alone.
        tokens: number of tokens that regressions see.
    """

    def __init__(
        self, blocks: ModelBlocks, tokens: CalibrationTokens, work: Path, key: Mapping[str, Any], batch_size: int
    ) -> None:
        """Open the files.

        Args:
            blocks: the dense model.
            tokens: the calibration text.
            work: folder of the files.
            key: what they depend on, in JSON types.
            batch_size: sequences at a time.

        Raises:
            InputError: the disk is too small.
        """
        held_out = is_held_out(len(tokens.ids))

        def stream(folder: str, sequences: Tensor, name: str = "the compressed model") -> Stream:
            ids, mask = tokens.ids[sequences], tokens.mask[sequences]
            return Stream(blocks, ids, mask, work / folder, key, name=name, batch_size=batch_size)

        self._blocks = blocks
        self.dense = Halves(stream("dense", ~held_out, "the model"), stream("dense-held", held_out, "the model"))
        self.refitted = Halves(stream("refitted", ~held_out), stream("refitted-held", held_out))
        self.truncated = stream("truncated-held", held_out)
        self._all = [*self.dense, *self.refitted, self.truncated]
        self.tokens = int(tokens.mask[~held_out].sum())
        check_room({each.store: 2 for each in self._all})

    def begin(self) -> int:
        """The first block that is still to be done, whose input is there from here on."""
        ready = [index for index in range(self._blocks.count + 1) if all(each.has(index) for each in self._all)]
        if ready:
            return ready[-1]
        for each in self._all:
            each.embed()
        return 0

    def forget(self, index: int) -> None:
        """Give up the input of a block."""
        for each in self._all:
            each.forget(index)

    def losses(self) -> tuple[float, float, float]:
        """Of the held-out sequences, nats per token: the dense, the truncated and the refitted model."""
        with self._blocks.head() as head:
            losses = [each.loss(head) for each in (self.dense.held_out, self.truncated, self.refitted.held_out)]
        dense, truncated, refitted = (loss.nll / loss.tokens for loss in losses)
        return dense, truncated, refitted


def is_held_out(sequences: int) -> Tensor:
    """[sequences] bool: every :data:`HELD_OUT`-th, and the last one where there are fewer."""
    held_out = torch.zeros(sequences, dtype=torch.bool)
    held_out[HELD_OUT - 1 :: HELD_OUT] = True
    held_out[-1] |= not bool(held_out.any())
    return held_out
