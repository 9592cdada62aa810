"""Numbers as a page writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from svdconvert.nats import perplexity as perplexity_of
from svdconvert.words import size as bytes_text

__all__ = [
    "bytes_text",
    "count",
    "decimals",
    "duration",
    "in_column",
    "nats",
    "perplexity",
    "rounded",
    "share",
    "signed_nats",
]


def count(number: int) -> str:
    """``134,515,008``."""
    return f"{number:,}"


def rounded(number: float) -> str:
    """A large number in three or four digits: ``134.5 M``."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= unit:
            value = number / unit
            return f"{value:.4g}{name}" if value < 1e6 else f"{value:.1e}{name}"
    return f"{number:g}"


def share(part: float, whole: float, digits: int = 1) -> str:
    """``84.2 %``; empty where there is no whole."""
    return f"{100 * part / whole:.{digits}f} %" if whole > 0 else ""


def decimals(number: float, digits: int = 4) -> str:
    """A number with at least two digits that count: with its decimals, or in scientific notation."""
    ordinary = number == 0 or 10.0 ** (1 - digits) <= abs(number) < 1e6
    return f"{number:.{digits}f}" if ordinary else f"{number:.2e}"


def in_column(numbers: Sequence[float]) -> Callable[[float], str]:
    """How the numbers of a column are written: with as many decimals as give most of them two digits that count."""
    sizes = [abs(number) for number in numbers if number]
    digits = 1 + math.ceil(-math.log10(median(sizes))) if sizes else 0
    return lambda number: f"{number:.{digits}f}" if 4 < digits < 9 and abs(number) < 1e6 else decimals(number)


def nats(loss: float) -> str:
    """A loss, nats per token."""
    return decimals(loss)


def signed_nats(loss: float) -> str:
    """A change of the loss, nats per token."""
    return ("+" if loss >= 0 else "") + decimals(loss)


def perplexity(loss: float) -> str:
    """exp of a loss."""
    value = perplexity_of(loss)
    return "beyond 1e+308" if value == math.inf else f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``12.3 s``, ``5 min 12 s``, ``1 h 3 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.05 or seconds == 0 else f"{1000 * seconds:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
