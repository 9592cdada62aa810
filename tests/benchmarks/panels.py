"""What the benchmarks' pictures are put together from: bars with what they stand for beside them, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdconvert.commands.figures import COLOURS, GREY, MARKERS, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of a group's height, which is 1 with the gap to the next group.
_GROUP = 0.8
# Behind a text, so that no line runs through it.
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


@dataclass(frozen=True)
class Bar:
    """Attributes: its length, and what is written at its end."""

    value: float
    text: str


def draw_bars(
    panel: Axes, groups: Sequence[str], series: Mapping[str, Sequence[Bar | None]], unit: str, *, compared: float = 0.0
) -> None:
    """Lying bars, grouped, the first group at the top.

    Args:
        panel: empty.
        groups: names of the groups.
        series: name -> a bar for each group, None where it has none.
        unit: what the length is.
        compared: where a line for what is compared with belongs; 0 leaves it out.
    """
    height = _GROUP / len(series)
    longest = max(bar.value for bars in series.values() for bar in bars if bar)
    for number, (name, bars) in enumerate(series.items()):
        there = [(place, bar) for place, bar in enumerate(bars) if bar]
        places = [place + (number - (len(series) - 1) / 2) * height for place, _ in there]
        values = [bar.value for _, bar in there]
        drawn = panel.barh(places, values, 0.9 * height, color=COLOURS[number % len(COLOURS)], label=name)
        panel.bar_label(drawn, [bar.text for _, bar in there], padding=3, fontsize=8, bbox=_CLEAR)
    if compared:
        panel.axvline(compared, color=GREY, linestyle="--", linewidth=1)
    # Room for the longest text, which constrained layout does not see.
    texts = [(bar.value / longest, len(bar.text)) for bars in series.values() for bar in bars if bar]
    width = panel.get_position().width * panel.figure.get_figwidth()
    panel.set_xlim(0, longest * max(share + 0.075 * letters / width for share, letters in texts))
    panel.set_yticks(range(len(groups)), groups, fontsize=9)
    panel.set_ylim(len(groups) - 0.5, -0.5)
    panel.set_xlabel(unit)
    tidy(panel)
    panel.grid(visible=False, axis="y")


def draw_curves(
    panel: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], unit: str, *, first_colour: int = 0
) -> None:
    """Lines through marked points, on axes whose ticks are where the points are.

    Args:
        panel: empty.
        curves: name -> (x, y) of the points.
        unit: what x is.
        first_colour: which colour and marker the first line has.
    """
    for number, (name, points) in enumerate(curves.items(), first_colour):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        panel.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
    panel.set_xticks(sorted({x for points in curves.values() for x, _ in points}))
    panel.set_xlabel(unit)
    tidy(panel)
