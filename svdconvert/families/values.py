"""Kinds of values that fields of config.json have."""

from __future__ import annotations

from svdconvert.fields import FLAG, Kind, optional

MOST = 2**31 - 1


def whole(least: int, most: int = MOST) -> Kind:
    """A whole number of a range."""
    return Kind(f"a whole number from {least} to {most:,}", lambda value: type(value) is int and least <= value <= most)


def given(kind: Kind) -> Kind:
    """A field that may be missing but not null."""
    return Kind(kind.name, kind.fits, needed=False)


NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e38)
NOT_NEGATIVE = Kind("a number from 0 on", lambda value: NUMBER.fits(value) and value >= 0)
ABOVE_0 = Kind("a number above 0", lambda value: NUMBER.fits(value) and value > 0)

# A size without which there is no model, and one that the stock class has a default for, which may be written as 0.
SIZE, SIZE_OR_DEFAULT = given(whole(1)), optional(whole(0))
# There are this many blocks at most, since something is made for each.
BLOCKS = optional(whole(1, 10_000))
# A factor may be anything, a divisor not 0, and an epsilon not negative.
FACTOR, DIVISOR, EPSILON = optional(NUMBER), optional(ABOVE_0), optional(NOT_NEGATIVE)
SWITCH = optional(FLAG)
