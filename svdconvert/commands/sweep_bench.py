"""Converting and measuring the models of a sweep, one after the other."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from svdconvert.commands.convert import run_conversion
from svdconvert.commands.evaluate import evaluate
from svdconvert.commands.sweep_book import DENSE, Point, Setting
from svdconvert.jobs.model_files import digest
from svdconvert.models.passages import read_passage
from svdconvert.models.windows import read_text
from svdconvert.planning.events import Events
from svdconvert.planning.plan import Plan
from svdconvert.planning.steps import Step
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.source import Source
from svdconvert.version import versions


@dataclass(frozen=True)
class Bench:
    """The dense model of a sweep and the text, on which every converted model is measured.

    Attributes:
        model: as the user names it.
        source: the same, opened.
        dense: the same, whole on this disk.
        text: what perplexity is measured on.
        models: folder of the converted models.
        keep: whether they stay there.
        events: receiver of progress.
        measuring: keywords of :func:`svdconvert.evaluate`.
    """

    model: str | os.PathLike[str]
    source: Source
    dense: Path
    text: Path
    models: Path
    keep: bool
    events: Events
    measuring: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        source: Source,
        dense: Path,
        text: Path,
        measuring: Mapping[str, Any],
        models: Path,
        events: Events,
        *,
        keep: bool,
    ) -> Bench:
        """Read the text, which settles the windows.

        Args:
            model, source, dense, text, models, events, keep: see the attributes.
            measuring: ``window``, ``stride``, ``batch_size`` and ``device`` of :func:`svdconvert.evaluate`.

        Raises:
            InputError: the text cannot be used.
        """
        passage = read_passage(dense, source.config, text, measuring["window"], measuring["stride"])
        known = {"window": passage.window, "stride": passage.stride, "progress": partial(events.progress, "tokens")}
        return cls(model, source, dense, text, models, keep, events, {**measuring, **known})

    def conditions(self, request: Conversion) -> dict[str, Any]:
        """What all points have in common, for the book of the sweep.

        Args:
            request: one of its conversions.
        """
        return {
            "svdconvert": versions()["svdconvert"],
            **self.source.identity(),
            **self.source.side_identity(),
            "text": digest(read_text(self.text).encode()),
            "window": self.measuring["window"],
            "stride": self.measuring["stride"],
            "targets": list(request.scope.targets),
            "dtype": request.output.dtype,
            "device": request.runtime.device.split(":")[0],
            **({"split_fused": True} if request.scope.split_fused else {}),
        }

    def folder(self, setting: Setting) -> Path:
        """Where the model of a setting is."""
        return self.models / setting.folder

    def lacks(self, setting: Setting) -> bool:
        """Whether the model should be kept and is missing."""
        return self.keep and not (self.folder(setting) / "config.json").is_file()

    def dense_point(self, plan: Plan) -> Point:
        """The untouched model's row of the book.

        Args:
            plan: of any conversion of it.
        """
        self.events.note("measuring the dense model")
        found = evaluate(self.dense, self.text, **self.measuring)
        sizes = (plan.params_before, plan.bytes_before)
        return Point(DENSE, *sizes, found.perplexity, found.bits_per_character, 0.0, None, found.seconds, 0.0)

    def point(self, request: Conversion, events: Events) -> Point:
        """Convert, and measure the result against the dense model.

        Args:
            request: what is asked for.
            events: receiver of the conversion's progress.
        """
        start, setting = time.perf_counter(), Setting.of(request)
        report = run_conversion(self.model, self.folder(setting), request, events)
        found = evaluate(self.folder(setting), self.text, **self.measuring, against=self.dense)
        assert found.divergence is not None
        self.source.refuse_changed()
        return Point(
            setting,
            report.plan.params_after,
            report.plan.bytes_after,
            found.perplexity,
            found.bits_per_character,
            found.divergence.added,
            report.outcome.record.get("predicted_loss"),
            time.perf_counter() - start,
            found.divergence.kl,
        )

    def tidy(self, setting: Setting) -> None:
        """Remove a model that has been measured, unless models stay."""
        if not self.keep:
            shutil.rmtree(self.folder(setting), ignore_errors=True)


class Quiet(Events):
    """Progress of the conversions within a sweep: bars, and every note once."""

    def __init__(self, outer: Events) -> None:
        self._outer, self._told = outer, set[str]()

    def begin(self, steps: Sequence[Step], done_before: int) -> None:
        if steps:
            self._outer.begin(steps, done_before)

    def solving(self, step: Step) -> None:
        self._outer.solving(step)

    def decomposed(self, step: Step) -> None:
        self._outer.decomposed(step)

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        self._outer.solved(step, report)

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self._outer.progress(phase, done, total, detail)

    def note(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._outer.note(text)
