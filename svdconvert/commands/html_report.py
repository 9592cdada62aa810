"""The page of a finished result or of a sweep, made of its record alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from svdconvert.commands.sweep_book import PAGE, RESULT, Point, Sweep, read_sweep
from svdconvert.commands.ways import Options
from svdconvert.errors import InputError
from svdconvert.jobs.output import held_result
from svdconvert.jobs.own_files import claim
from svdconvert.jobs.record import RECORD, REPORT, read_record
from svdconvert.paths import user_path
from svdconvert.reports import options_page
from svdconvert.reports.document import HEAD_BYTES, is_page
from svdconvert.reports.result_page import result_page
from svdconvert.reports.sweep_page import Row, sweep_page
from svdconvert.sentences import asked
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import open_regular, reading


def report(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write a page about a finished result or a sweep: one HTML file that needs no network.

    It is made of ``svdconvert.json`` or ``sweep.json`` alone, also of one that an earlier version wrote, and the same
    record gives the same page.

    Args:
        folder: what :func:`convert`, ``densify``, ``fold`` or :func:`sweep` wrote.
        out: file to write; by default ``report.html`` in the folder, which then belongs to the result: it is pushed
            with it, and ``overwrite`` replaces it. For a sweep it is ``sweep.html``.

    Returns:
        The page.

    Raises:
        InputError: the folder is not finished, its record is damaged, or the file would replace somebody else's.
        JobError: the disk fails.
    """
    path, place = user_path(folder), None if out is None else check_page(user_path(out))
    if (path / RESULT).is_file() and not (path / RECORD).exists():
        return _written(place or check_page(path / PAGE), _sweep_page(read_sweep(path)))
    if not (path / "config.json").is_file() or not (path / RECORD).is_file():
        raise InputError(f"{path} holds no finished result of svdconvert; convert a model into it first")
    return write_report(path, place)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """:func:`report` of a folder that is known to be finished.

    Args:
        folder: of the result.
        out: file to write; None for ``report.html`` in the folder.

    Raises:
        InputError: a job is at the folder, or as :func:`report`.
    """
    if out is not None:
        return _written(out, result_page(read_record(folder), folder / RECORD))
    with held_result(folder):
        page = result_page(read_record(folder), folder / RECORD)
        claim(folder, REPORT)
        return _written(folder / REPORT, page)


def write_options(found: Options, out: Path) -> Path:
    """Write a page about what can be had of a model.

    Args:
        found: that.
        out: file to write, see :func:`check_page`.

    Raises:
        JobError: the disk fails.
    """
    rows = [options_page.Row(way.name, way.kind, way.bytes, way.loss, found.cells(way)) for way in found.ways]
    lead, measured = found.advice, found.measured
    return _written(
        out, options_page.options_page(found.model, lead, found.about, found.heads, rows, measured=measured)
    )


def _written(place: Path, page: bytes) -> Path:
    with disk_errors(place.parent):
        atomic_write(place, page)
    return place


def _sweep_page(sweep: Sweep) -> bytes:
    lines = {name: [_row(point) for point in points] for name, points in sweep.lines.items()}
    return sweep_page(sweep.model, sweep.text, sweep.headline, replace(_row(sweep.dense), budget=""), lines)


def _row(point: Point) -> Row:
    own = {name: getattr(point, name) for name in ("params", "bytes", "perplexity", "added", "kl")}
    return Row(budget=point.setting.budget, **own)


def check_page(out: Path) -> Path:
    """A file that can be written.

    Raises:
        InputError: it is a folder, in one that does not exist, or there and no page of ours.
    """
    if out.is_dir():
        raise InputError(f"{asked('out', out)} is a folder; give the name of a file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{asked('out', out)} is in a folder that does not exist; create it first")
    if out.exists():
        with reading(out), open_regular(out) as handle:
            begins = handle.read(HEAD_BYTES)
        if begins and not is_page(begins):
            raise InputError(
                f"{asked('out', out)} is there and is no page that svdconvert wrote; move it away, or give the name of "
                "another file"
            )
    return out
