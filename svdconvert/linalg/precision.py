"""What float32 and float64 can hold, and what they can tell from nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.sentences import asked

# float32 is good while lambda_1 <= this * lambda_r, that is sigma_1 / sigma_r <= 50.
FLOAT32_EIGENVALUE_RATIO = 2.5e3

# Below this squared relative error, total minus captured energy loses its digits; the residual is then formed.
CANCELLATION = {torch.float32: 1e-3, torch.float64: 1e-9}

# Entries whose squares, times those of a metric, stay far inside float64's range. No other type holds others.
LEAST_ENTRY, GREATEST_ENTRY = 1e-100, 1e100

# Powers of four that a float32 matrix can be multiplied with.
FLOAT32_SCALES = (4.0**-63, 4.0**63)


def largest_entry(weight: Tensor) -> float:
    """The largest absolute entry.

    Raises:
        InputError: it is NaN or infinite, or its square would be too near to the ends of float64's range.
    """
    low, high = torch.aminmax(weight)  # NaN wins in both
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest):
        raise InputError("it has NaN or infinite entries")
    if largest and not LEAST_ENTRY <= largest <= GREATEST_ENTRY:
        raise InputError(
            f"its largest entry is {largest:.1e}, and squares of entries beyond {GREATEST_ENTRY:g} or all below "
            f"{LEAST_ENTRY:g} leave the range of float64; rescale it, or leave it out of {asked('targets')}"
        )
    return largest


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; in a tenth of the time of ``isfinite().all()``."""
    if not tensor.numel():
        return True
    tensor = tensor.detach()
    # NaN wins in both. In one call, aminmax, they take far longer.
    return math.isfinite(float(tensor.amax())) and math.isfinite(float(tensor.amin()))


def check_entries(weight: Tensor) -> None:
    """Refuse a matrix whose entries cannot be computed with. Raises as :func:`largest_entry`."""
    largest_entry(weight)


def scale_of(largest: float) -> float:
    """What a matrix is to be multiplied with, by its largest absolute entry, to keep squares inside float32's range.

    A power of four; 1 for ordinary weights.
    """
    if largest == 0 or 2**-12 <= largest <= 2**12:
        return 1.0
    return 4.0 ** -math.floor(math.log2(largest) / 2)


def float32_is_enough(highest: float, lowest: float) -> bool:
    """Whether an eigenproblem that was solved in float32 is good, by the highest eigenvalue and the lowest wanted."""
    return highest <= FLOAT32_EIGENVALUE_RATIO * lowest or highest == 0


def least_tail(size: int, highest: float) -> float:
    """What the eigenvalues of a [size, size] problem beyond a rank must add up to for float32 to tell it from nothing.

    Of zeros it left up to 0.15 of this, in exactly low-rank matrices.
    """
    return size * torch.finfo(torch.float32).eps * highest


def refuse_overflow(tensor: Tensor, what: str, advice: str) -> None:
    """Refuse a tensor that has left the range of its type.

    Args:
        tensor: in its storage type, any shape.
        what: its name in the message.
        advice: what the user can do about it.

    Raises:
        InputError: an entry is NaN or infinite.
    """
    if not is_finite(tensor):
        raise InputError(f"{what} is not finite in {str(tensor.dtype)[6:]}; {advice}")


def refuse_overflowing_factor(factor: Tensor) -> None:
    """:func:`refuse_overflow` of a truncation's factor."""
    refuse_overflow(factor, "a factor of it", f"choose {asked('dtype', 'bfloat16')} or float32")
