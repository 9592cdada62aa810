"""Which sequences of a calibration text a compressed model is measured on, and on which its budget is corrected."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.factoring.refit_streams import is_held_out
from svdconvert.sentences import asked

# Tokens that are judged by, and corrected by in one round; more would tell apart what matters little.
JUDGED = 2**13
CORRECTED = 2**12
# Parts of the text of a round that are measured apart, at least: what differs between them is noise.
PARTS = 8
# What is read of a sequence to correct by, from its beginning, so that there are as many parts.
READ = CORRECTED // PARTS


def held_out_sample(tokens: CalibrationTokens) -> Tensor:
    """Numbers of the sequences to judge by: those that are held out, about :data:`JUDGED` tokens of them; int64.

    Raises:
        InputError: there are too few sequences.
    """
    if len(tokens.ids) < 2:
        raise InputError(
            "measuring needs at least 2 calibration sequences, one of them held out; raise "
            f"{asked('calibration.samples')}"
        )
    held_out = is_held_out(len(tokens.ids)).nonzero()[:, 0]
    return held_out[: max(1, JUDGED // tokens.ids.shape[1])]


def correction_sample(tokens: CalibrationTokens, number: int) -> Tensor:
    """Numbers of the sequences to correct by, of those that are not held out; int64. :data:`READ` tokens of each count.

    Every round has others as long as there are some: the noise of one is then not that of the next. There are at least
    two, and where there are more than :data:`PARTS`, a multiple of it.

    Args:
        tokens: the text.
        number: of the round, from 0 on.

    Raises:
        InputError: there are too few sequences.
    """
    if len(tokens.ids) < 3:
        raise InputError(
            f"{asked('allocation', 'measured')} needs at least 3 calibration sequences, one of them held out; raise "
            f"{asked('calibration.samples')}"
        )
    others = (~is_held_out(len(tokens.ids))).nonzero()[:, 0]
    count = min(CORRECTED // min(tokens.ids.shape[1], READ), len(others))
    count -= count % PARTS if count > PARTS else 0
    return others[(torch.arange(count) + number * count) % len(others)].sort().values
