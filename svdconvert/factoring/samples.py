"""Which sequences of a calibration text a compressed model is measured on, and on which its budget is corrected."""

from __future__ import annotations

from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.factoring.refit_streams import is_held_out
from svdconvert.sentences import asked

# Tokens that are measured each time; more would tell apart what matters little.
TOKENS = 2**14


def held_out_sample(tokens: CalibrationTokens) -> Tensor:
    """Numbers of sequences to judge by: those that are held out, :data:`TOKENS` tokens of them at most; int64.

    Raises:
        InputError: there are too few sequences.
    """
    if len(tokens.ids) < 2:
        raise InputError(
            "measuring needs at least 2 calibration sequences, one of them held out; raise "
            f"{asked('calibration.samples')}"
        )
    return _some(tokens, is_held_out(len(tokens.ids)))


def correction_sample(tokens: CalibrationTokens) -> Tensor:
    """Numbers of sequences to correct by: two or more of the others, :data:`TOKENS` tokens of them at most; int64.

    Raises:
        InputError: there are too few sequences.
    """
    if len(tokens.ids) < 3:
        raise InputError(
            f"{asked('allocation', 'measured')} needs at least 3 calibration sequences, one of them held out; raise "
            f"{asked('calibration.samples')}"
        )
    return _some(tokens, ~is_held_out(len(tokens.ids)), least=2)


def _some(tokens: CalibrationTokens, chosen: Tensor, least: int = 1) -> Tensor:
    numbers = chosen.nonzero()[:, 0]
    return numbers[: max(least, TOKENS // tokens.ids.shape[1])]
