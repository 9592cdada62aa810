"""The smallest size that loses at most so much, found by measuring few sizes.

What is lost grows about as a power of what is cut off. So the search keeps a size that loses too much and a larger one
that does not, and goes where the power through both meets the limit; where that gets on too slowly, to the middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Sizes are multiples of 1 / STEPS of what all targets take.
STEPS = 200
LARGEST = (STEPS - 1) / STEPS
# The size that is measured first, 80 %, and the power before two sizes tell it: 1.8 on a real model, 4 on small ones.
_FIRST, _POWER = 160, 2.5
# How far a step goes at most, as a power of e in what is cut off.
_FARTHEST = 1.0
# Measurements after which the interval has to be half as long.
_PATIENCE = 3


@dataclass(frozen=True)
class Bounds:
    """An interval of sizes, in steps.

    Attributes:
        low: loses too much, or 0.
        high: loses no more than the limit, or :data:`STEPS`, which loses nothing.
    """

    low: int
    high: int

    @property
    def closed(self) -> bool:
        """Whether no size lies between."""
        return self.high - self.low == 1


def smallest(
    lost: Callable[[int], float], limit: float, *, first: int = _FIRST, bounds: Bounds = Bounds(0, STEPS)
) -> Bounds:
    """Measure sizes until the smallest one is known that loses at most ``limit``; the next smaller one loses more.

    Args:
        lost: what a size of so many steps loses; infinite where no model of that size can be made.
        limit: above 0.
        first: the size to begin with.
        bounds: what is known beforehand.

    Returns:
        A closed interval. Its upper end is :data:`STEPS` where every size loses too much.
    """
    known: dict[int, float] = {}
    guess, lengths = float(first), [bounds.high - bounds.low]
    while not bounds.closed:
        step = min(max(math.ceil(guess), bounds.low + 1), bounds.high - 1)
        known[step] = lost(step)
        fits = known[step] <= limit
        bounds = Bounds(bounds.low if fits else step, step if fits else bounds.high)
        lengths.append(bounds.high - bounds.low)
        slow = len(lengths) > _PATIENCE and 2 * lengths[-1] > lengths[-1 - _PATIENCE]
        guess = (bounds.low + bounds.high) / 2 if slow else _crossing(known, bounds, limit)
        if slow:
            lengths = lengths[-1:]
    return bounds


def _crossing(known: dict[int, float], bounds: Bounds, limit: float) -> float:
    """Where what is lost is expected to be the limit."""
    # Less than nothing is lost where an over-confident model is smoothed; it is then simply little.
    logs = {step: math.log(value if value > 0 else limit / 1000) for step, value in known.items() if value < math.inf}
    wanted = math.log(limit)
    if not logs:
        return (bounds.low + bounds.high) / 2
    if bounds.low in logs and bounds.high in logs:
        nearest = [bounds.low, bounds.high]
    else:
        nearest = sorted(logs, key=lambda step: abs(logs[step] - wanted))[:2]
    cuts = [math.log(STEPS - step) for step in nearest]
    power = (logs[nearest[1]] - logs[nearest[0]]) / (cuts[1] - cuts[0]) if len(nearest) > 1 else _POWER
    ahead = (wanted - logs[nearest[0]]) / (power if power > 0 else _POWER)
    return STEPS - math.exp(cuts[0] + min(max(ahead, -_FARTHEST), _FARTHEST))
