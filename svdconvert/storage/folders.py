"""Folders: a local model, of which only regular files inside it are read, and a folder to write into."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.storage.documents import reading

# Depth of folders that is searched: code and templates of a tokenizer are not deeper.
_DEPTH = 2
# The Hub cache's own form: models--owner--name/snapshots/<commit>/file -> ../../blobs/<hash>
_CACHED = re.compile(r"models--(?P<repo>[^/]+)")


def refuse_foreign_files(folder: Path, *, known: bool, leftovers: Collection[str] = ()) -> None:
    """Refuse an output folder that holds somebody else's files.

    Args:
        folder: where a command is about to write; it need not exist.
        known: whether it holds a result or job of such a command.
        leftovers: names that an interrupted run of that command may have left in a folder that is not known.

    Raises:
        InputError: it is a file, or not known and holds more than leftovers.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as {asked('out')}")
    if not known and folder.is_dir() and any(entry.name not in leftovers for entry in folder.iterdir()):
        raise InputError(f"{folder} holds files that svdconvert did not write; give another folder")


class ModelFolder:
    """A folder's files.

    Attributes:
        sizes: path in the folder -> bytes, of all files, unusable ones included.
    """

    def __init__(self, folder: Path) -> None:
        """List the files; hidden folders are skipped.

        Raises:
            InputError: the folder cannot be read.
        """
        self.sizes: dict[str, int] = {}
        self._wrong: dict[str, str] = {}
        self._root = folder.resolve()
        self._inside = [self._root]
        if cached_repo(folder) is not None:
            self._inside.append((self._root.parents[1] / "blobs").resolve())
        with reading(folder):
            self._list(folder, "", _DEPTH)

    def check(self, names: Iterable[str]) -> None:
        """Check that files are regular ones inside the folder; links in the Hub cache are allowed.

        Raises:
            InputError: one of them is not; it is named.
        """
        for name in names:
            for part in (name, name.partition("/")[0]):
                if part in self._wrong:
                    raise InputError(self._wrong[part])

    def _list(self, folder: Path, prefix: str, depth: int) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name, path = prefix + entry.name, folder / entry.name
            if entry.is_dir(follow_symlinks=False):
                if depth and not entry.name.startswith("."):
                    self._list(path, f"{name}/", depth - 1)
                continue
            wrong, size = self._look(path, linked=entry.is_symlink())
            self.sizes[name] = size
            if wrong:
                self._wrong[name] = wrong

    def _look(self, path: Path, *, linked: bool) -> tuple[str, int]:
        """What is wrong with a file (empty if nothing), and its size."""
        to = f"{path} is a link to {os.readlink(path)}" if linked else str(path)
        try:
            status, target = path.stat(), path.resolve()
        except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
            return f"{to}, which does not exist; put the file in its place, or remove the link", 0
        if linked and not any(target.is_relative_to(root) for root in self._inside):
            return f"{to}, outside of the model's folder, and is not followed; put what it leads to in its place", 0
        if stat.S_ISDIR(status.st_mode):
            return f"{to}, a folder; put the folder itself in its place", 0
        if not stat.S_ISREG(status.st_mode):
            return f"{to}{',' if linked else ' is'} not a regular file; put the right file in its place", 0
        return "", status.st_size


def cached_repo(folder: Path) -> tuple[str, str] | None:
    """``(owner/name, commit)`` of a snapshot in the Hub cache; None for any other folder."""
    path = folder.resolve()
    if len(path.parents) < 2 or path.parent.name != "snapshots":
        return None
    match = _CACHED.fullmatch(path.parents[1].name)
    return (match["repo"].replace("--", "/"), path.name) if match else None
