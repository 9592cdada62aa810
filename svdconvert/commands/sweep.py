"""Parameters against perplexity: one model at several budgets, from one calibration and one set of decompositions."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from svdconvert.calibration.knowledge import Calibration, find_knowledge
from svdconvert.commands.convert import run_conversion
from svdconvert.commands.evaluate import evaluate
from svdconvert.commands.sweep_book import DENSE, RESULT, Book, Point, Setting, Sweep
from svdconvert.commands.sweep_grid import make_grid
from svdconvert.jobs.model_files import digest
from svdconvert.jobs.output import clear_folder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.layouts.table import DEFAULT
from svdconvert.machine.devices import resolve_device
from svdconvert.models.passages import Passage, read_passage, read_text
from svdconvert.models.preflight import check_model
from svdconvert.planning.events import Events
from svdconvert.planning.make import make_plan
from svdconvert.planning.plan import Plan
from svdconvert.planning.steps import Step
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.folders import refuse_foreign_files
from svdconvert.storage.locks import FolderLock
from svdconvert.storage.opening import local_folder, open_source
from svdconvert.storage.source import Source
from svdconvert.version import versions

# What a sweep that ended before its first result may have left.
_OWN = {JOB_FOLDER, f".{RESULT}.tmp"}


def sweep(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: Sequence[float] = (),
    rank: Sequence[int] = (),
    methods: Sequence[str] = (),
    layouts: Sequence[str] = (DEFAULT.name,),
    allocation: str | None = None,
    calibration: Calibration | None = None,
    stats: str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    shrinkage: float | None = None,
    refit: str = "none",
    targets: Sequence[str] = (),
    split_fused: bool = False,
    dtype: str = "keep",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    work: str | os.PathLike[str] | None = None,
    keep_models: bool = False,
    plot: bool = True,
    overwrite: bool = False,
    workers: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    events: Events | None = None,
) -> Sweep:
    """Convert a model at every budget by every method and layout, and measure each.

    Writes ``sweep.json`` after every point, then ``sweep.md`` and ``sweep.png``. Points that the folder holds already
    are not computed again: an interrupted call goes on where it stopped, and another budget, method or layout is
    added to what is there.

    Args:
        model, allocation, stats, alpha, shrinkage, refit, targets, split_fused, dtype, workers, device,
            events: see :func:`svdconvert.convert`. An option counts for the methods that read it.
        text: UTF-8 text file to measure perplexity on; it should not be the calibration's.
        out: folder to write.
        keep: fractions of the target parameters to keep.
        rank: instead, ranks of every target.
        methods: rows of :data:`svdconvert.methods.table.METHODS`; by default kfac where there is a text, else svd.
        layouts: rows of :data:`svdconvert.layouts.table.LAYOUTS`.
        calibration: text of the data-aware methods. For more than one of them its statistics are collected once, and
            kept until the end.
        window, stride, batch_size: see :func:`svdconvert.evaluate`.
        work: folder that keeps the decompositions, as ``work`` of :func:`svdconvert.convert`; of several methods each
            has a folder of its name in it. Without it they are removed when all points are done.
        keep_models: keep every converted model in ``out/models``.
        plot: write ``sweep.png``; needs matplotlib.
        overwrite: give up the points that the folder holds.
        revision: branch, tag or commit on the Hub; the model is downloaded into the Hugging Face cache.

    Raises:
        InputError: the request cannot be met, or the folder holds a sweep of something else.
        JobError: it broke off; the same call continues it.
    """
    if plot:
        from svdconvert.commands.figures import need_matplotlib

        need_matplotlib()
    events = events or Events()
    folder = Path(out).expanduser()
    internal = folder / JOB_FOLDER
    used = resolve_device(device)
    common = {
        "allocation": allocation,
        "alpha": alpha,
        "shrinkage": shrinkage,
        "refit": refit,
        "targets": targets,
        "split_fused": split_fused,
        "dtype": dtype,
        "workers": workers,
        "revision": revision,
        "device": used,
        "check": keep_models,
    }
    place = internal / "work" if work is None else Path(work).expanduser()
    grid = make_grid(
        common, keep=keep, rank=rank, methods=methods, layouts=layouts, calibration=calibration, stats=stats, work=place
    )
    refuse_foreign_files(folder, known=(folder / RESULT).is_file(), leftovers=_OWN)
    dense_folder = local_folder(os.fspath(model), revision)
    source = open_source(os.fspath(model), revision, download_folder=internal / "source")
    plans = [make_plan(source, request) for request in grid.requests]  # what cannot be met is refused now
    check_model(source)
    passage = read_passage(dense_folder, source.config, Path(text).expanduser(), window, stride)
    measuring = {"batch_size": batch_size, "device": used, "window": passage.window, "stride": passage.stride}
    knowledge = find_knowledge(source, grid.looks_at, events)
    settings = _conditions(source, passage, Path(text).expanduser(), grid.requests[0])
    with _held(folder, internal):
        book = Book(folder, source.name, str(text), settings, None if knowledge is None else knowledge.key, overwrite)
        bench = _Bench(model, source, dense_folder, text, measuring, (folder if keep_models else internal), events)
        if book.dense is None:
            events.note("measuring the dense model")
            book.dense = bench.dense(plans[0])
            book.write()
        missing = [
            request
            for request in grid.requests
            if Setting.of(request) not in book.points or (keep_models and not bench.is_there(Setting.of(request)))
        ]
        if len(missing) < len(grid.requests):
            done = len(grid.requests) - len(missing)
            events.note(f"{done} of {len(grid.requests)} points were measured by an earlier run")
        if missing:
            grid.collect(model, revision, used, events)
        for request in missing:
            point = bench.point(request)
            source.refuse_changed()
            book.points[point.setting] = point
            book.write()
            if not keep_models:
                shutil.rmtree(bench.folder(point.setting), ignore_errors=True)
            events.note(
                f"{point.setting.line}, {point.setting.budget}: perplexity {point.perplexity:.2f} ({point.added:+.4f})"
            )
        result = Sweep(source.name, str(text), book.dense, list(book.points.values()), folder)
        _write_pages(result, plot=plot)
        clear_folder(internal, ignore_errors=True)
    return result


class _Bench:
    """Converts and measures, one model after the other."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        source: Source,
        dense_folder: Path,
        text: str | os.PathLike[str],
        measuring: Mapping[str, Any],
        place: Path,
        events: Events,
    ) -> None:
        """Prepare.

        Args:
            model: as the user names it.
            source: the same, opened.
            dense_folder: the same, whole on this disk.
            text: what perplexity is measured on.
            measuring: options of :func:`svdconvert.evaluate`.
            place: holds the folder ``models``.
            events: receiver of progress.
        """
        self._model, self._source, self._dense, self._text = model, source, dense_folder, text
        self._measuring: dict[str, Any] = {**measuring, "progress": partial(events.progress, "tokens")}
        self._place, self._events = place / "models", _Quiet(events)

    def folder(self, setting: Setting) -> Path:
        """Where the model of a setting is."""
        return self._place / setting.folder

    def is_there(self, setting: Setting) -> bool:
        """Whether that model is finished."""
        return (self.folder(setting) / "config.json").is_file()

    def dense(self, plan: Plan) -> Point:
        """The untouched model's row of the book."""
        found = evaluate(self._dense, self._text, **self._measuring)
        sizes = (plan.params_before, plan.bytes_before)
        return Point(DENSE, *sizes, found.perplexity, found.bits_per_character, 0.0, None, found.seconds, 0.0)

    def point(self, request: Conversion) -> Point:
        """The row of a conversion, which is done now and measured against the dense model."""
        start, setting = time.perf_counter(), Setting.of(request)
        report = run_conversion(self._model, self.folder(setting), request, self._events)
        found = evaluate(self.folder(setting), self._text, **self._measuring, against=self._dense)
        assert found.divergence is not None
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


def _conditions(source: Source, passage: Passage, text: Path, request: Conversion) -> dict[str, Any]:
    """What all points of a sweep have in common, for its book."""
    return {
        "svdconvert": versions()["svdconvert"],
        **source.identity(),
        **source.side_identity(),
        "text": digest(read_text(text).encode()),
        "window": passage.window,
        "stride": passage.stride,
        "targets": list(request.scope.targets),
        "dtype": request.output.dtype,
        "device": request.runtime.device.split(":")[0],
        **({"split_fused": True} if request.scope.split_fused else {}),
    }


def _write_pages(result: Sweep, *, plot: bool) -> None:
    """Write ``sweep.md``, and ``sweep.png`` if there is to be one.

    Raises:
        JobError: the disk fails.
    """
    with disk_errors(result.folder):
        atomic_write(result.folder / "sweep.md", result.to_markdown().encode())
    if plot:
        from svdconvert.commands.figures import save_figure, sweep_figure

        save_figure(sweep_figure(result), result.folder / "sweep.png")


@contextmanager
def _held(folder: Path, internal: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder.

    Raises:
        InputError: one is at work in it.
    """
    lock = FolderLock(folder, internal / "lock", f"give another {asked('out')}")
    lock.acquire()
    try:
        yield
    finally:
        lock.release(remove=True)
        with suppress(OSError):
            internal.rmdir()  # unless there is something to go on with


class _Quiet(Events):
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
