"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user wrote: ``~`` is the home folder, and ``~somebody`` that of a user.

    As in a shell, it stands for itself where there is no such user.
    """
    return Path(os.path.expanduser(path))
