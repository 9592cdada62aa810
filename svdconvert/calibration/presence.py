"""Whether a folder holds statistics, before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from svdconvert.errors import InputError

STATE = "stats.json"


def no_statistics(folder: Path) -> str:
    """What is wrong with a folder that has no :data:`STATE`."""
    return f"{folder} has no {STATE}, so it holds no statistics; give the folder that `svdconvert calibrate` wrote"


def require_statistics(folder: Path) -> None:
    """Refuse a folder without statistics.

    Raises:
        InputError: it is one.
    """
    if not (folder / STATE).is_file():
        raise InputError(no_statistics(folder))
