"""Parameters against perplexity: one model at several budgets, from one calibration and one set of decompositions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from svdconvert.calibration.knowledge import Calibration, find_knowledge
from svdconvert.commands.sweep_bench import Bench, Quiet
from svdconvert.commands.sweep_book import RESULT, Book, Setting, Sweep
from svdconvert.commands.sweep_grid import Grid, make_grid
from svdconvert.jobs.output import clear_folder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.layouts.table import DEFAULT_LAYOUT
from svdconvert.machine.devices import resolve_device
from svdconvert.models.preflight import check_model
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.events import Events
from svdconvert.planning.make import make_plan
from svdconvert.sentences import asked
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.folders import refuse_foreign_files
from svdconvert.storage.locks import FolderLock
from svdconvert.storage.opening import local_folder, open_source

# What a sweep that ended before its first result may have left.
_OWN = {JOB_FOLDER, f".{RESULT}.tmp"}

# Keywords of a conversion that all points have in common, and those in which they differ.
_COMMON = "allocation alpha shrinkage refit targets split_fused dtype workers revision".split()
_VARIED = "keep rank methods layouts calibration stats".split()


def sweep(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    keep: float | Sequence[float] = (),
    rank: int | Sequence[int] = (),
    methods: str | Sequence[str] = (),
    layouts: str | Sequence[str] = (DEFAULT_LAYOUT.name,),
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
        keep: fractions of the target parameters to keep. Of this, rank, methods and layouts one value may stand alone.
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
    keywords = dict(locals())  # the arguments, before anything else has a name here
    if plot:
        from svdconvert.commands.figures import need_matplotlib

        need_matplotlib()
    events, used = events or Events(), resolve_device(device)
    folder = user_path(out)
    internal = folder / JOB_FOLDER
    place = internal / "work" if work is None else user_path(work)
    common = {name: keywords[name] for name in _COMMON} | {"device": used, "check": keep_models}
    grid = make_grid(common, **{name: keywords[name] for name in _VARIED}, work=place)
    refuse_foreign_files(folder, known=(folder / RESULT).is_file(), leftovers=_OWN)
    dense = local_folder(path_or_text(model), revision)
    source = open_source(path_or_text(model), revision, download_folder=internal / "source")
    plans = [make_plan(source, request) for request in grid.requests]  # what cannot be met is refused now
    check_model(source)
    models = (folder if keep_models else internal) / "models"
    measuring = {"window": window, "stride": stride, "batch_size": batch_size, "device": used}
    bench = Bench.of(model, source, dense, user_path(text), measuring, models, events, keep=keep_models)
    knowledge = find_knowledge(source, grid.looks_at, events, folder=place, device=used)
    conditions, key = bench.conditions(grid.requests[0]), None if knowledge is None else knowledge.key
    with _held(folder, internal):
        book = Book(folder, source.name, str(text), conditions, key, overwrite)
        book.dense = book.dense or bench.dense_point(plans[0])
        book.write()
        _measure(book, grid, bench, revision)
        result = Sweep(source.name, str(text), book.dense, list(book.points.values()), folder)
        _write_pages(result, plot=plot)
        clear_folder(internal, ignore_errors=True)
    return result


def _measure(book: Book, grid: Grid, bench: Bench, revision: str | None) -> None:
    """Measure the points that a book lacks; it is written after each."""
    missing = [
        request
        for request in grid.requests
        if Setting.of(request) not in book.points or bench.lacks(Setting.of(request))
    ]
    if len(missing) < len(grid.requests):
        done = len(grid.requests) - len(missing)
        bench.events.note(f"{done} of {len(grid.requests)} points were measured by an earlier run")
    if missing:
        grid.collect(bench.model, revision, missing[0].runtime.device, bench.events)
    quiet = Quiet(bench.events)
    for request in missing:
        point = bench.point(request, quiet)
        book.points[point.setting] = point
        book.write()
        bench.tidy(point.setting)
        bench.events.note(
            f"{point.setting.line}, {point.setting.budget}: perplexity {point.perplexity:.2f} ({point.added:+.4f})"
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
