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

from svdconvert.calibration.knowledge import Calibration, check_knowledge, check_parts, default_method, find_knowledge
from svdconvert.commands.calibrate import calibrate
from svdconvert.commands.convert import Report, convert
from svdconvert.commands.evaluate import Evaluation, evaluate
from svdconvert.commands.sweep_book import DENSE, RESULT, Book, Point, Setting, Sweep
from svdconvert.errors import InputError
from svdconvert.jobs.model_files import digest
from svdconvert.jobs.output import clear_folder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.layouts.table import DEFAULT, layout_named
from svdconvert.machine.devices import resolve_device
from svdconvert.methods.table import Method, method_named, method_options
from svdconvert.models.passages import Passage, read_passage, read_text
from svdconvert.models.preflight import check_model
from svdconvert.planning.allocation import chosen_allocation
from svdconvert.planning.events import Events
from svdconvert.planning.plan import Plan, make_plan
from svdconvert.planning.ranks import RankRequest
from svdconvert.planning.steps import Step
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
            events: see
            :func:`svdconvert.convert`. An option counts for the methods that read it.
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
    methods = methods or [default_method(None, calibration, stats)]
    rows = list({method_named(name).name: method_named(name) for name in methods}.values())
    given = {"alpha": alpha, "shrinkage": shrinkage}
    chosen = _settings(rows, layouts, allocation, given, keep, rank, refit)
    aware = [row for row in rows if row.statistics]
    check_knowledge((aware or rows)[0], calibration, stats, refit=refit)
    for row in aware:  # several have their statistics collected first
        check_parts(row, collected=stats is not None or len(aware) > 1, split_fused=split_fused)
    used = resolve_device(device)
    internal = folder / JOB_FOLDER
    refuse_foreign_files(folder, known=(folder / RESULT).is_file(), leftovers=_OWN)
    dense_folder = local_folder(os.fspath(model), revision)
    source = open_source(os.fspath(model), revision, download_folder=internal / "source")
    plans = [_plan(source, setting, targets, dtype, split_fused) for setting in chosen]
    check_model(source)
    measuring: dict[str, Any] = {"batch_size": batch_size, "device": used}
    measuring["progress"] = partial(events.progress, "tokens")
    passage = read_passage(dense_folder, source.config, Path(text).expanduser(), window, stride)
    measuring |= {"window": passage.window, "stride": passage.stride}
    knowledge = find_knowledge(source, calibration, stats, events)
    settings = {
        **_conditions(source, Path(text).expanduser(), passage, targets, dtype, used),
        **({"split_fused": True} if split_fused else {}),
    }
    with _held(folder, internal):
        book = Book(folder, source.name, str(text), settings, None if knowledge is None else knowledge.key, overwrite)
        if book.dense is None:
            events.note("measuring the dense model")
            found = evaluate(dense_folder, text, **measuring)
            sizes = (plans[0].params_before, plans[0].bytes_before)
            book.dense = Point(DENSE, *sizes, found.perplexity, found.bits_per_character, 0.0, None, found.seconds, 0.0)
            book.write()
        dense = book.dense

        def model_folder(setting: Setting) -> Path:
            return (folder if keep_models else internal) / "models" / setting.folder

        missing = [
            setting
            for setting in chosen
            if setting not in book.points or (keep_models and not (model_folder(setting) / "config.json").is_file())
        ]
        if len(missing) < len(chosen):
            events.note(f"{len(chosen) - len(missing)} of {len(chosen)} points were measured by an earlier run")
        place = internal / "work" if work is None else Path(work).expanduser()
        if calibration is not None and len(aware) > 1 and missing:
            stats = place / f"statistics-{'-'.join(sorted(row.name for row in aware))}"
            names = [row.name for row in aware]
            calibrate(model, calibration, stats, methods=names, revision=revision, device=used, events=events)
            calibration = None
        quiet = _Quiet(events)
        for setting in missing:
            start = time.perf_counter()
            row, target = method_named(setting.method), model_folder(setting)
            report = convert(
                model,
                target,
                keep=setting.keep,
                rank=setting.rank,
                targets=targets,
                split_fused=split_fused,
                method=row.name,
                dtype=dtype,
                device=used,
                revision=revision,
                calibration=calibration if row.statistics or refit != "none" else None,
                stats=stats if row.statistics or refit != "none" else None,
                refit=refit,
                allocation=setting.allocation,
                layout=setting.layout,
                work=place if len(rows) == 1 else place / row.name,
                workers=workers,
                check=keep_models,
                events=quiet,
                alpha=dict(setting.options).get("alpha"),
                shrinkage=dict(setting.options).get("shrinkage"),
            )
            found = evaluate(target, text, **measuring, against=dense_folder)
            source.refuse_changed()
            book.points[setting] = point = _point(setting, report, found, time.perf_counter() - start)
            book.write()
            if not keep_models:
                shutil.rmtree(target, ignore_errors=True)
            events.note(f"{setting.line}, {setting.budget}: perplexity {point.perplexity:.2f} ({point.added:+.4f})")
        result = Sweep(source.name, str(text), dense, list(book.points.values()), folder)
        _write_pages(result, plot=plot)
        clear_folder(internal, ignore_errors=True)
    return result


def _conditions(
    source: Source, text: Path, passage: Passage, targets: Sequence[str], dtype: str, device: str
) -> dict[str, Any]:
    """What all points of a sweep have in common, for its book."""
    return {
        "svdconvert": versions()["svdconvert"],
        **source.identity(),
        **source.side_identity(),
        "text": digest(read_text(text).encode()),
        "window": passage.window,
        "stride": passage.stride,
        "targets": list(targets),
        "dtype": dtype,
        "device": device.split(":")[0],
    }


def _point(setting: Setting, report: Report, found: Evaluation, seconds: float) -> Point:
    """A row of the book, from a conversion and what was measured of its result against the dense model."""
    assert found.divergence is not None
    return Point(
        setting,
        report.plan.params_after,
        report.plan.bytes_after,
        found.perplexity,
        found.bits_per_character,
        found.divergence.added,
        report.outcome.record.get("predicted_loss"),
        seconds,
        found.divergence.kl,
    )


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


def _settings(
    methods: Sequence[Method],
    layouts: Sequence[str],
    allocation: str | None,
    given: Mapping[str, float | None],
    keep: Sequence[float],
    rank: Sequence[int],
    refit: str,
) -> list[Setting]:
    """All combinations, line after line, the largest budget first."""
    if bool(keep) == bool(rank):
        raise InputError("give either --keep or --rank, the budgets to measure")
    if not methods or not layouts:
        raise InputError("give at least one --method and one --layout")
    for name, value in given.items():
        if value is not None and not any(name in row.options for row in methods):
            method_options(methods[0], {name: value})  # refuses it
    budgets: list[dict[str, Any]] = [{"keep": share} for share in sorted(set(keep), reverse=True)]
    budgets += [{"rank": number} for number in sorted(set(rank), reverse=True)]
    found = []
    for row in methods:
        options = method_options(row, {name: value for name, value in given.items() if name in row.options})
        for layout in dict.fromkeys(layout_named(name).name for name in layouts):
            for budget in budgets:
                spread = chosen_allocation(row, allocation, RankRequest(**budget))
                found.append(Setting(row.name, tuple(options.items()), layout, spread, **budget, refit=refit))
    return found


def _plan(source: Source, setting: Setting, targets: Sequence[str], dtype: str, split_fused: bool) -> Plan:
    """Refuses what cannot be met before anything is computed."""
    request = RankRequest(rank=setting.rank, keep=setting.keep)
    return make_plan(
        source,
        request,
        method=setting.method,
        targets=targets,
        dtype=dtype,
        layout=setting.layout,
        split_fused=split_fused,
    )


@contextmanager
def _held(folder: Path, internal: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder.

    Raises:
        InputError: one is at work in it.
    """
    lock = FolderLock(folder, internal / "lock", "give another --out")
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
