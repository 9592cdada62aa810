"""Which sequences of a text are trained on, in which order, and which ones judge."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.factoring.refit_streams import HELD_OUT
from svdconvert.sentences import asked

# Tokens that judge; more would tell apart what matters little.
JUDGED = 2**13


def judges(tokens: CalibrationTokens) -> Tensor:
    """Numbers of the sequences that judge: every eighth, spread over the text, at most :data:`JUDGED` tokens; int64.

    Raises:
        InputError: there are too few sequences.
    """
    count, length = tokens.ids.shape
    if count < 2:
        raise InputError(
            "healing needs at least 2 sequences of text, one of them held out; give more text, shorter sequences "
            f"({asked('calibration.length')}), or raise {asked('calibration.samples')}"
        )
    wanted = max(1, min(count // HELD_OUT, JUDGED // length))
    # the middles of as many equal parts
    return (torch.arange(wanted) * 2 + 1) * count // (2 * wanted)


class Order:
    """The order in which sequences are trained on: all of them, shuffled anew each time."""

    def __init__(self, sequences: Tensor, batch: int, seed: int) -> None:
        """Prepare.

        Args:
            sequences: numbers of the sequences, int64.
            batch: sequences of a step.
            seed: shuffles them.
        """
        self._sequences, self._batch, self._seed = sequences, batch, seed

    def __call__(self, step: int) -> Tensor:
        """Numbers of the sequences of a step, counted from 0; int64 [batch]."""
        count = len(self._sequences)
        places = torch.arange(step * self._batch, (step + 1) * self._batch)
        rounds = {int(number): self._shuffled(int(number)) for number in (places // count).unique()}
        return torch.stack([rounds[int(place) // count][int(place) % count] for place in places])

    def _shuffled(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % 2**63)
        return self._sequences[torch.randperm(len(self._sequences), generator=generator)]
