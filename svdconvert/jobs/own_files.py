"""Which files of an output folder are ours: somebody else's are neither replaced nor removed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from svdconvert.errors import InputError
from svdconvert.jobs.record import ANEW, RECORD, SEAL, is_changed, sealed
from svdconvert.sentences import asked
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import json_bytes, json_or_none, read_json
from svdconvert.storage.folders import refuse_foreign_files
from svdconvert.storage.other_formats import ADAPTER_CONFIG
from svdconvert.storage.source import PICKLE_INDEX, SAFE_INDEX
from svdconvert.words import listing

JOB_FOLDER = ".svdconvert"
# In it: what the job is.
JOB_FILE = "job.json"
# What every result has, beside weights and what the source has.
FILES = ("config.json", RECORD, "README.md")

# What would be taken for a part of a model that it lies beside.
_WEIGHTS = (".safetensors", ".bin")
_MODEL_FILES = frozenset({SAFE_INDEX, PICKLE_INDEX, "generation_config.json", ADAPTER_CONFIG})


def refuse_foreign(folder: Path, *, overwrite: bool, more: Collection[str] = ()) -> None:
    """Refuse a folder with somebody else's files, before anything is read or downloaded for it.

    Args:
        folder: where the result goes.
        overwrite: whether it may take the place of another one.
        more: files of the result beside those that every one has.

    Raises:
        InputError: it is a file, or holds files and neither a job nor a result of ours, or, where it is to be
            overwritten, files that are not ours and in the way.
    """
    known = overwrite or (folder / JOB_FOLDER).is_dir() or (folder / RECORD).is_file()
    refuse_foreign_files(folder, known=known)
    if overwrite and folder.is_dir():
        refuse_in_the_way(folder, (*FILES, *more), written_files(folder))


def refuse_in_the_way(folder: Path, names: Iterable[str], ours: Collection[str]) -> None:
    """Refuse to write over files that svdconvert has not written, or beside what would be taken for a part of a model.

    Args:
        folder: where the model goes.
        names: files that it will have.
        ours: files that we may replace.

    Raises:
        InputError: there are such files; they are named and stay.
    """
    wanted = set(names)
    there = [
        entry.name
        for entry in folder.iterdir()
        if entry.name in wanted or entry.name in _MODEL_FILES or entry.name.endswith(_WEIGHTS)
    ]
    there += [name for name in sorted(wanted) if "/" in name and (folder / name).exists()]
    foreign = sorted(set(there) - set(ours))
    if foreign:
        raise InputError(
            f"{folder} holds {listing(foreign)}, which svdconvert did not write and which would be replaced or taken "
            "for a part of the model; move it away, or give another folder"
        )


def written_files(folder: Path) -> set[str]:
    """Files that a result's record and a job say they have written or will."""
    documents = [path for path in (folder / RECORD, folder / JOB_FOLDER / JOB_FILE) if path.is_file()]
    written: set[str] = set(FILES) if documents else set()
    for path in documents:
        document = json_or_none(path)
        files = None if document is None else document.get("files")
        if isinstance(files, list):
            written.update(name for name in files if isinstance(name, str) and _is_inside(folder, name))
    return written


def claim(folder: Path, name: str) -> None:
    """Add a file to those that a finished result's record names, before it is written.

    Raises:
        InputError: there is one that svdconvert has not written.
        JobError: the disk fails.
    """
    path = folder / RECORD
    document = read_json(path, f"{folder} has no {RECORD}", ANEW)
    files = document.get("files") or []
    if name in files:
        return
    if os.path.lexists(folder / name):
        raise InputError(f"{folder} holds {name}, which svdconvert did not write; move it away, or give {asked('out')}")
    longer = {**document, "files": sorted([*files, name])}
    if SEAL in document and not is_changed(document):  # what somebody changed does not become right
        longer = sealed(longer)
    with disk_errors(folder):
        atomic_write(path, json_bytes(longer))


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name is that of a file in a folder, and no way out of it."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or parts[0] == JOB_FOLDER:
        return False
    return not any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts)))
