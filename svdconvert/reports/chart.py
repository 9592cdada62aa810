"""A chart of lines through points, as SVG: one axis of sizes, one of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from svdconvert.reports.markup import Markup, element

# In the units of the drawing.
_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 28, 52
# Series have a colour each in style.css, and a shape of their own for those who cannot tell colours apart.
SERIES = 7
_SHAPES = (
    "M-4.5 0A4.5 4.5 0 1 0 4.5 0A4.5 4.5 0 1 0 -4.5 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5L5 4H-5Z",
    "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "M0 5L5 -4H-5Z",
    "M-1.5 -5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    "M-5 -2L-2 -5L5 2L2 5ZM-5 2L2 -5L5 -2L-2 5Z",
)
# From such a ratio on, the smallest values of a linear axis lie on each other.
_LOGARITHMIC = 20.0


@dataclass(frozen=True)
class Point:
    """A point of a chart.

    Attributes:
        x, y: where it is.
        hint: all about it, shown where the pointer is.
    """

    x: float
    y: float
    hint: str


@dataclass(frozen=True)
class Axis:
    """Values to places in a drawing.

    Attributes:
        low, high: ends, which are ticks.
        ticks: values that are written.
        start, end: their places.
        logarithmic: whether equal ratios are equally long.
    """

    low: float
    high: float
    ticks: Sequence[float]
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The place of a value; values beyond the ends are at the ends."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def linear(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis whose ticks are multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [step * number for number in range(first, max(last, first + 1) + 1)]
    return Axis(ticks[0], ticks[-1], ticks, start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis of positive values whose ends are powers of ten; ticks at 1, 2 and 5 where there are few of these."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)
    every, factors = max(1, (last - first) // 8), (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last, every) for factor in factors]
    return Axis(10.0**first, 10.0**last, [*ticks, 10.0**last], start, end, logarithmic=True)


def loss_axis(values: Sequence[float]) -> Axis:
    """The upright axis: logarithmic where the values are far apart."""
    bottom, top = _HEIGHT - _BOTTOM, _TOP
    if min(values) > 0 and max(values) / min(values) > _LOGARITHMIC:
        return logarithmic(values, bottom, top)
    return linear([0.0, *values], bottom, top)


def line_chart(
    series: Mapping[str, Sequence[Point]],
    label: str,
    across: str,
    upright: str,
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
) -> Markup:
    """The chart; lines are told apart by colour and by the shape of their points.

    Args:
        series: name -> points, in the order of their line; at least one point.
        label: what it shows, for screen readers.
        across, upright: names of the axes.
        write_x, write_y: numbers at the ticks.
    """
    points = [point for line in series.values() for point in line]
    x = linear([point.x for point in points], _LEFT, _WIDTH - _RIGHT)
    y = loss_axis([point.y for point in points])
    bottom = _HEIGHT - _BOTTOM
    grid = [element("path", d=f"M{_LEFT} {y.at(tick):.1f}H{_WIDTH - _RIGHT}", class_="grid") for tick in y.ticks]
    marks = [
        element("text", write_y(tick), x=_LEFT - 8, y=f"{y.at(tick) + 4:.1f}", text_anchor="end") for tick in y.ticks
    ]
    marks += [
        element("text", write_x(tick), x=f"{x.at(tick):.1f}", y=bottom + 20, text_anchor="middle") for tick in x.ticks
    ]
    marks.append(element("text", upright, x=0, y=12, class_="axis"))
    marks.append(element("text", across, x=_WIDTH - _RIGHT, y=_HEIGHT - 8, text_anchor="end", class_="axis"))
    drawn = [_line(number % SERIES, line, x, y) for number, line in enumerate(series.values())]
    size = f"0 0 {_WIDTH} {_HEIGHT}"
    return element("svg", grid, marks, drawn, viewBox=size, role="img", aria_label=label, class_="chart")


def _line(number: int, points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    places = [(x.at(point.x), y.at(point.y)) for point in points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    dots = [
        element("path", element("title", point.hint), d=_SHAPES[number], transform=f"translate({a:.1f} {b:.1f})")
        for point, (a, b) in zip(points, places, strict=True)
    ]
    return element("g", element("path", d=path, class_="line"), dots, class_=f"s{number}")


def shape(number: int) -> Markup:
    """The point of a series, for a legend."""
    drawn = element("g", element("path", d=_SHAPES[number % SERIES]), class_=f"s{number % SERIES}")
    return element("svg", drawn, viewBox="-7 -7 14 14", class_="shape", aria_hidden="true")
