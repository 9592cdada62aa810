"""Many comparisons in two figures: the geometric mean of how many times as fast, and the smallest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import geometric_mean


def overall(ratios: Iterable[float]) -> dict[str, float]:
    """``geometric_mean`` and ``smallest`` of what the other side takes over what svdconvert takes.

    Raises:
        ValueError: there are none, or one is not positive.
    """
    found = list(ratios)
    return {"geometric_mean": geometric_mean(found), "smallest": min(found)}


def overall_line(other: str, found: Mapping[str, float]) -> str:
    """A sentence for below a table."""
    mean, least = found["geometric_mean"], found["smallest"]
    return f"Faster than {other}: geometric mean {mean:.2f}x, smallest {least:.2f}x."
