"""What a sweep has measured: its points, and the book, ``sweep.json``, in which they are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.fields import COUNT, NUMBER, OBJECT, POSITIVE, TEXT, many, nullable, optional, record, require, table
from svdconvert.jobs.output import clear_folder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.jobs.record import RECORD
from svdconvert.methods.table import method_named
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.differences import refuse_other_settings
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import in_json_types, read_json

RESULT = "sweep.json"
PAGE = "sweep.html"
_PAGES = ("sweep.md", "sweep.png", PAGE)


@dataclass(frozen=True)
class Setting:
    """One way to convert.

    Attributes:
        method: row of :data:`svdconvert.methods.table.METHODS`, or ``dense`` for the untouched model.
        options: the method's settings, names and values.
        layout: row of :data:`svdconvert.layouts.table.LAYOUTS`; empty for the untouched model.
        allocation: ``uniform``, ``global`` or ``measured``; empty for the untouched model.
        keep: fraction of the target parameters kept, or None.
        rank: instead, the rank of every target.
        refit: ``none`` or ``sequential``.
    """

    method: str
    options: tuple[tuple[str, float], ...]
    layout: str
    allocation: str
    keep: float | None = None
    rank: int | None = None
    refit: str = "none"

    @classmethod
    def of(cls, request: Conversion) -> Setting:
        """What tells a conversion from the others of its sweep."""
        recipe, size = request.recipe, request.size
        options = tuple(request.options.items())
        return cls(request.method.name, options, recipe.layout, request.allocation, size.keep, size.rank, recipe.refit)

    @property
    def line(self) -> str:
        """What it shares with the other budgets of its line: ``kfac, global, pivoted, shrinkage 0.1``."""
        defaults = method_named(self.method).options
        changed = [f"{name} {value:g}" for name, value in self.options if value != defaults.get(name)]
        refit = [] if self.refit == "none" else [f"refit {self.refit}"]
        return ", ".join([self.method, self.allocation, self.layout, *changed, *refit])

    @property
    def budget(self) -> str:
        """``60% kept`` or ``rank 128``."""
        return f"rank {self.rank}" if self.keep is None else f"{100 * self.keep:g}% kept"

    @property
    def folder(self) -> str:
        """Name for its model."""
        options = [f"{name}{value:g}" for name, value in self.options]
        budget = f"rank{self.rank}" if self.keep is None else f"keep{self.keep:g}"
        refit = [] if self.refit == "none" else [f"refit-{self.refit}"]
        return "-".join([self.method, self.allocation, self.layout, *options, *refit, budget])


@dataclass(frozen=True)
class Point:
    """One row of a sweep.

    Attributes:
        setting: how the model was converted.
        params: parameters of the whole model.
        bytes: of its weight files.
        perplexity, bits_per_character: on the text, see :class:`svdconvert.Evaluation`.
        added: log-perplexity on top of the dense model's, nats per token.
        predicted_loss: what the method expected to add, nats per token; None where it expects nothing.
        seconds: wall time of conversion and evaluation.
        kl: KL(dense || model), nats per token; None in a sweep of an earlier version.
    """

    setting: Setting
    params: int
    bytes: int
    perplexity: float
    bits_per_character: float | None
    added: float
    predicted_loss: float | None
    seconds: float
    kl: float | None = None

    @property
    def losses(self) -> str:
        """Added log-perplexity and KL, two cells of a Markdown table."""
        return f"{self.added:+.4f} | {'' if self.kl is None else f'{self.kl:.4f}'}"

    def to_json(self) -> dict[str, Any]:
        """The row in JSON types: the fields of the setting, then its own."""
        setting = asdict(self.setting) | {"options": dict(self.setting.options)}
        own = {name: value for name, value in vars(self).items() if name != "setting"}
        return {**setting, **own, "perplexity": self.perplexity if math.isfinite(self.perplexity) else None}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Point:
        """What :meth:`to_json` gave."""
        own = {"refit": "none", "kl": None, **row, "options": tuple(row["options"].items())}
        own["perplexity"] = math.inf if own["perplexity"] is None else own["perplexity"]
        setting = Setting(**{name: own[name] for name in Setting.__dataclass_fields__})
        return cls(setting, **{name: own[name] for name in cls.__dataclass_fields__ if name != "setting"})


@dataclass(frozen=True)
class Sweep:
    """Result of :func:`sweep`.

    Attributes:
        model, text: what was measured on what.
        dense: the untouched model.
        points: all that the folder holds, line after line, the largest budget first.
        folder: where the files are.
    """

    model: str
    text: str
    dense: Point
    points: Sequence[Point]
    folder: Path

    @property
    def lines(self) -> dict[str, list[Point]]:
        """The points by what they share, see :attr:`Setting.line`; of each the largest budget first."""
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.setting.line, []).append(point)
        return {name: sorted(points, key=lambda point: -point.params) for name, points in found.items()}

    @property
    def headline(self) -> str:
        """The best point of the smallest budget, in one sentence."""
        if not self.points:
            return f"perplexity {self.dense.perplexity:.2f}"
        least = min(self.points, key=lambda point: point.setting.keep or point.setting.rank or 0).setting
        same = [p for p in self.points if (p.setting.keep, p.setting.rank) == (least.keep, least.rank)]
        best = min(same, key=lambda point: point.perplexity)
        dense = self.dense.perplexity
        return f"best at {least.budget}: {best.setting.line}, perplexity {best.perplexity:.2f} (dense {dense:.2f})"

    def to_json(self) -> dict[str, Any]:
        """``model``, ``text``, ``dense`` and ``points``, rows as :meth:`Point.to_json`."""
        return {
            "model": self.model,
            "text": self.text,
            "dense": self.dense.to_json(),
            "points": [point.to_json() for point in self.points],
        }

    def to_markdown(self) -> str:
        """The table of ``sweep.md``."""
        head = "| | kept | parameters | bytes | perplexity | added log-perplexity | KL to dense |\n"
        rows = [("dense", self.dense, " | ")]
        rows += [(line, point, point.losses) for line, points in self.lines.items() for point in points]
        return (
            head
            + "|---" * 7
            + "|\n"
            + "".join(
                f"| {line} | {'' if line == 'dense' else point.setting.budget.removesuffix(' kept')} "
                f"| {point.params:,} | {point.bytes:,} | {point.perplexity:.2f} | {losses} |\n"
                for line, point, losses in rows
            )
        )


def read_sweep(folder: Path) -> Sweep:
    """The sweep that a folder holds.

    Raises:
        InputError: it is damaged, or has not measured the dense model yet.
    """
    path = folder / RESULT
    found = read_json(path, f"{folder} holds no sweep", _ANEW)
    require(found, {**_BOOK, "model": TEXT, "text": TEXT}, path, _ANEW)
    if not found.get("dense"):
        raise InputError(f"{path} has no measured point yet; finish the sweep first")
    points = [Point.from_json(row) for row in found["points"]]
    return Sweep(found["model"], found["text"], Point.from_json(found["dense"]), points, folder)


DENSE = Setting("dense", (), "", "")

_ANEW = f"give another folder as {asked('out')}, or start again with {asked('overwrite', True)}"
_POINT = {
    "method": TEXT,
    "options": table(NUMBER),
    "layout": TEXT,
    "allocation": TEXT,
    "keep": nullable(NUMBER),
    "rank": nullable(COUNT),
    "refit": replace(TEXT, needed=False),
    "params": COUNT,
    "bytes": COUNT,
    "perplexity": nullable(POSITIVE),
    "bits_per_character": NUMBER,
    "added": NUMBER,
    "predicted_loss": nullable(NUMBER),
    "seconds": NUMBER,
    "kl": optional(NUMBER),
}
_BOOK = {
    "settings": OBJECT,
    "calibration": optional(OBJECT),
    "dense": optional(record(_POINT)),
    "points": many(record(_POINT)),
}


class Book:
    """``sweep.json``: what was measured, and under what."""

    def __init__(
        self,
        folder: Path,
        model: str,
        text: str,
        settings: Mapping[str, Any],
        calibration: Mapping[str, Any] | None,
        overwrite: bool,
    ) -> None:
        """Open or begin it.

        Raises:
            InputError: it is of other settings; the field that differs is named.
        """
        self._path = folder / RESULT
        self._head: dict[str, Any] = {"model": model, "text": text}
        self._head |= in_json_types({"settings": settings, "calibration": calibration})
        self.dense: Point | None = None
        self.points: dict[Setting, Point] = {}
        if overwrite:
            with disk_errors(folder):
                self._clear(folder)
        elif self._path.is_file():
            found = read_json(self._path, "", _ANEW)
            require(found, _BOOK, self._path, _ANEW)
            self._resume(found)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def _clear(self, folder: Path) -> None:
        """Remove what a sweep has left: the files that it names, and no others."""
        names: set[str] = set()
        with suppress(InputError):  # what is damaged names nothing
            found = read_json(self._path, "")
            require(found, _BOOK, self._path, _ANEW)
            names = {Point.from_json(row).setting.folder for row in found["points"]}
        for name in names:
            if "/" not in name and (folder / "models" / name / RECORD).is_file():
                shutil.rmtree(folder / "models" / name)
        clear_folder(folder / JOB_FOLDER)
        for name in (RESULT, *_PAGES):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            (folder / "models").rmdir()

    def _resume(self, theirs: Mapping[str, Any]) -> None:
        ours = dict(self._head["settings"])
        other = dict(theirs["settings"])
        # A sweep of plain methods alone may be joined by one with a text.
        if theirs.get("calibration") and self._head["calibration"]:
            ours |= self._head["calibration"]
            other |= theirs["calibration"]
        refuse_other_settings(other, ours, f"{self._path} was measured with", _ANEW)
        self._head["calibration"] = self._head["calibration"] or theirs.get("calibration")
        self.dense = Point.from_json(theirs["dense"]) if theirs.get("dense") else None
        for row in theirs.get("points") or []:
            point = Point.from_json(row)
            self.points[point.setting] = point

    def write(self) -> None:
        """Make what was measured durable."""
        content = {
            **self._head,
            "dense": self.dense.to_json() if self.dense else None,
            "points": [point.to_json() for point in self.points.values()],
        }
        with disk_errors(self._path.parent):
            atomic_write(self._path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
