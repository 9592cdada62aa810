"""Numbers to shades of a colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from svdconvert.reports.markup import Markup, element

# Shades of a scale, in style.css.
SHADES = 10


@dataclass(frozen=True)
class Scale:
    """Numbers to shades.

    Attributes:
        name: of its colours, see style.css.
        low, high: ends of the scale.
        write: a number for people.
        logarithmic: whether equal ratios are equal steps.
    """

    name: str
    low: float
    high: float
    write: Callable[[float], str]
    logarithmic: bool = False

    def shade(self, value: float) -> str:
        """The class of a cell."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(at)
        place = (at - low) / (high - low) if high > low else 1.0
        return f"{self.name}{min(int(place * SHADES), SHADES - 1)}"

    @property
    def legend(self) -> Markup:
        """The shades with the numbers at both ends."""
        shades = [element("span", class_=f"{self.name}{step}") for step in range(SHADES)]
        least = self.write(self.low) + (" and less" if self.logarithmic else "")
        return element(
            "span", least, element("span", shades, class_="shades", aria_hidden="true"), self.write(self.high)
        )


def logarithmic(name: str, values: Sequence[float], write: Callable[[float], str]) -> Scale:
    """A scale up to the highest value, from one that few are below, so that an odd one leaves shades to the rest."""
    high = max(values)
    positive = sorted(value for value in values if value > 0)
    low = positive[len(positive) // 20] if positive else 1.0
    return Scale(name, low, max(high, low), write, logarithmic=True)
