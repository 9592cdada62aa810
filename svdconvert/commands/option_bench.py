"""Really making one way to store a model, and measuring it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.commands.conversion_job import conversion_job
from svdconvert.commands.evaluate import evaluate
from svdconvert.commands.measured_budgets import bench_of
from svdconvert.commands.stages import Prepared
from svdconvert.commands.sweep_bench import Quiet
from svdconvert.commands.work import Work
from svdconvert.fields import COUNT, NUMBER
from svdconvert.jobs.job import run_job
from svdconvert.jobs.model_files import digest
from svdconvert.machine.threads import usual_workers
from svdconvert.models.passages import read_passage
from svdconvert.models.windows import read_text
from svdconvert.planning.plan import Plan
from svdconvert.settings.conversion import Conversion

if TYPE_CHECKING:
    from svdconvert.factoring.sampled import Bench

# Windows that do not overlap.
PROTOCOL = "disjoint"


@dataclass(frozen=True)
class OptionBench:
    """Where ways are measured; what was measured is kept with the work.

    Attributes:
        work: the conversion whose decompositions they are made from; its folder is the models'.
        model: the dense one, whole on this disk.
        text: what is measured on.
        window: tokens of a window.
    """

    work: Work
    model: Path
    text: Path
    window: int

    @classmethod
    def of(cls, work: Work, model: Path, text: Path, window: int | None) -> OptionBench:
        """Read the text, which settles the windows.

        Args:
            work, model, text: see the attributes.
            window: None for the usual one.

        Raises:
            InputError: the text cannot be used.
        """
        return cls(work, model, text, read_passage(model, work.source.config, text, window, None, PROTOCOL).window)

    @cached_property
    def dense(self) -> Mapping[str, Any]:
        """``perplexity`` of the dense model, and ``tokens`` that are predicted."""

        def measure() -> dict[str, Any]:
            found = evaluate(self.model, self.text, **self._reading)
            return {"perplexity": found.perplexity, "tokens": found.tokens}

        return self._kept({}, {"perplexity": NUMBER, "tokens": COUNT}, measure)

    def measure(self, request: Conversion, plan: Plan, worths: Mapping[str, float]) -> Mapping[str, Any]:
        """``added`` log-perplexity and ``kl`` of a way; it is made, measured and removed.

        Args:
            request: the conversion that it is like.
            plan: of it, with the files of its decompositions.
            worths: module path -> what losses in the metrics are to be multiplied with.

        Raises:
            InputError: it cannot be made.
            JobError: it broke off; the same call goes on.
        """
        stored = [
            [t.module, t.rank, [None if grid is None else [grid.bits, grid.group] for grid in t.grids]]
            for t in plan.targets
        ]
        key = {"stored": stored, "layout": request.recipe.layout, "dtype": request.output.dtype}
        return self._kept(key, {"added": NUMBER, "kl": NUMBER}, lambda: self._measured(request, plan, worths, key))

    def _measured(
        self, request: Conversion, plan: Plan, worths: Mapping[str, float], key: Mapping[str, Any]
    ) -> dict[str, float]:
        name = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()
        work = replace(self.work, request=request, folder=self.work.folder / name, events=Quiet(self.work.events))
        settings = {**request.key(None if work.knowledge is None else work.knowledge.key), "way": name}
        run_job(
            "convert",
            work.source,
            settings,
            lambda: conversion_job(work, Prepared(plan, worths=worths), settings),
            work.folder,
            device=work.device,
            workers=request.runtime.workers or usual_workers(work.device, plan.solving_bytes, plan.device_bytes),
            events=work.events,
        )
        found = evaluate(work.folder, self.text, **self._reading, against=self.model)
        work.source.refuse_changed()
        shutil.rmtree(work.folder, ignore_errors=True)
        assert found.divergence is not None
        return {"added": found.divergence.added, "kl": found.divergence.kl}

    @cached_property
    def _bench(self) -> Bench:
        return bench_of(self.work)

    @cached_property
    def _digest(self) -> str:
        return digest(read_text(self.text).encode())

    @property
    def _reading(self) -> dict[str, Any]:
        progress = partial(self.work.events.progress, "tokens")
        return {"protocol": PROTOCOL, "window": self.window, "device": self.work.device, "progress": progress}

    def _kept(
        self, key: Mapping[str, Any], fields: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        whole = {**self._bench.key, **key, "measured on": self._digest, "window": self.window}
        found = self._bench.kept(whole, fields, measure)
        return {name: found[name] for name in fields}
