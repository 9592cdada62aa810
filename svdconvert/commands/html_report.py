"""The page of a finished result, made of its record alone."""

from __future__ import annotations

import os
from pathlib import Path

from svdconvert.errors import InputError
from svdconvert.jobs.own_files import claim
from svdconvert.jobs.record import RECORD, REPORT, read_record
from svdconvert.paths import user_path
from svdconvert.reports.result_page import result_page
from svdconvert.sentences import asked
from svdconvert.storage.disk import atomic_write, disk_errors


def report(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write a page about a finished result: one HTML file that needs no network.

    It is made of ``svdconvert.json`` alone, also of one that an earlier version wrote; the same record gives the same
    page.

    Args:
        folder: what :func:`convert`, ``densify`` or ``fold`` wrote.
        out: file to write; by default ``report.html`` in the folder, which then belongs to the result: it is pushed
            with it, and ``overwrite`` replaces it.

    Returns:
        The page.

    Raises:
        InputError: the folder is not finished, its record is damaged, or the file would replace somebody else's.
        JobError: the disk fails.
    """
    path = user_path(folder)
    if not (path / "config.json").is_file() or not (path / RECORD).is_file():
        raise InputError(f"{path} holds no finished result of svdconvert; convert a model into it first")
    return write_report(path, None if out is None else _checked(user_path(out)))


def write_report(folder: Path, out: Path | None = None) -> Path:
    """:func:`report` of a folder that is known to be finished.

    Args:
        folder: of the result.
        out: file to write; None for ``report.html`` in the folder.
    """
    page = result_page(read_record(folder), folder / RECORD)
    if out is None:
        claim(folder, REPORT)
    place = folder / REPORT if out is None else out
    with disk_errors(place.parent):
        atomic_write(place, page)
    return place


def _checked(out: Path) -> Path:
    """A file that can be written.

    Raises:
        InputError: it is a folder, or in one that does not exist.
    """
    if out.is_dir():
        raise InputError(f"{asked('out', out)} is a folder; give the name of a file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{asked('out', out)} is in a folder that does not exist; create it first")
    return out
