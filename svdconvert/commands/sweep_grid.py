"""The conversions of a sweep: every method and layout at every budget."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.calibration.knowledge import Calibration
from svdconvert.commands.calibrate import calibrate
from svdconvert.errors import InputError
from svdconvert.methods.table import Method, method_named
from svdconvert.planning.events import Events
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.text import Stats, Text


@dataclass(frozen=True)
class Grid:
    """The conversions, and the text of the data-aware methods among them.

    Attributes:
        requests: line after line, the largest budget first.
        looks_at: the text of the data-aware methods, or statistics of one; None for neither.
        collected: of several data-aware methods, for which the statistics of a text are collected first: the text,
            their names, and where the statistics go. None otherwise.
    """

    requests: Sequence[Conversion]
    looks_at: Text | Stats | None
    collected: tuple[Calibration, Sequence[str], Path] | None

    def collect(self, model: str | os.PathLike[str], revision: str | None, device: str, events: Events) -> None:
        """Collect the statistics that the requests name, where they have to be."""
        if self.collected is not None:
            text, methods, folder = self.collected
            calibrate(model, text, folder, methods=methods, revision=revision, device=device, events=events)


def make_grid(
    common: Mapping[str, Any],
    *,
    keep: float | Sequence[float],
    rank: int | Sequence[int],
    methods: str | Sequence[str],
    layouts: str | Sequence[str],
    calibration: Calibration | None,
    stats: str | os.PathLike[str] | None,
    work: Path,
) -> Grid:
    """All combinations.

    Args:
        common: keywords of :func:`svdconvert.convert` that all of them have; an option counts for the methods that
            read it.
        keep, rank, methods, layouts, calibration, stats: see :func:`svdconvert.sweep`.
        work: keeps the decompositions; of several methods, each has a folder of its name in it.

    Raises:
        InputError: a combination cannot be met.
    """
    shares, numbers = several(keep), several(rank)
    if bool(shares) == bool(numbers):
        raise InputError(f"give either {asked('keep')} or {asked('rank')}, the budgets to measure")
    looks_at = Conversion.of(calibration=calibration, stats=stats).calibration
    named = several(methods) or [Conversion(calibration=looks_at).method.name]
    rows = list({method_named(name).name: method_named(name) for name in named}.values())
    if not rows or not layouts:
        raise InputError(f"{asked('methods')} and {asked('layouts')} must each name at least one")
    aware = sorted(row.name for row in rows if row.statistics)
    collected = None
    if calibration is not None and len(aware) > 1:
        collected = (calibration, aware, work / f"statistics-{'-'.join(aware)}")
        calibration, stats = None, collected[2]
    requests = []
    for row in rows:
        keywords = {**common, "work": work if len(rows) == 1 else work / row.name}
        # A text that no method uses stays, so that the check refuses it.
        if row.statistics or common["refit"] != "none" or common["allocation"] == "measured" or not aware:
            keywords |= {"calibration": calibration, "stats": stats}
        for name in _for_others(row, rows):
            keywords[name] = None
        for layout in dict.fromkeys(several(layouts)):
            for budget in _budgets(shares, numbers):
                request = Conversion.of(**keywords, **budget, method=row.name, layout=layout)
                request.check()
                requests.append(request)
    return Grid(requests, looks_at, collected)


def several(value: str | float | Sequence[Any]) -> list[Any]:
    """Values of a list; one may stand alone."""
    return [value] if isinstance(value, str | int | float) else list(value)


def _for_others(row: Method, rows: Sequence[Method]) -> set[str]:
    """Method settings that another method of a sweep reads and this one does not."""
    return {name for other in rows for name in other.options} - set(row.options)


def _budgets(keep: Sequence[float], rank: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The largest first."""
    for share in sorted(set(keep), reverse=True):
        yield {"keep": share}
    for number in sorted(set(rank), reverse=True):
        yield {"rank": number}
