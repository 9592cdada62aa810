"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from svdconvert.errors import InputError


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user wrote: ``~`` is the home folder, and ``~somebody`` that of a user.

    As in a shell, it stands for itself where there is no such user.

    Raises:
        InputError: it is no path, or empty, which would be the working folder.
    """
    return Path(os.path.expanduser(path_or_text(path)))


def path_or_text(given: object) -> str:
    """What a user gives as a path, as text.

    Raises:
        InputError: it is no path, or empty.
    """
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str):
        raise InputError(f"{given!r} is not a path; give the name of a file or folder as text")
    if not path:
        raise InputError("the name of a file or folder is empty; give it, or . for the working folder")
    return path
