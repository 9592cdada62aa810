"""The journal of a job: one line for each finished step, with a digest, so that a torn or changed line is none.

A line is written when the data of its step are on the disk. Nothing is written behind a line that failed; the next run
writes the journal anew, with the lines that hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.fields import OBJECT, TEXT, problem, table
from svdconvert.storage.disk import atomic_write, create, sync, write_all
from svdconvert.storage.documents import MAX_JSON_BYTES, json_object, read_bytes

NAME = "journal.jsonl"

# "step": its key, "tensors": what it wrote, name -> digest of the data, "report": what became of it
Entry = Mapping[str, Any]
_FIELDS = {"step": TEXT, "tensors": table(TEXT), "report": OBJECT}


def journals(job: Path) -> list[Path]:
    """The journals in a job's folder: of all processes of the last run, and what earlier runs left."""
    return sorted(job.glob(f"{Path(NAME).stem}*{Path(NAME).suffix}"))


def read_journal(path: Path) -> list[Entry]:
    """The entries of the lines that hold.

    Raises:
        InputError: it cannot be read.
    """
    lines = read_bytes(path, f"{path} is missing", MAX_JSON_BYTES).split(b"\n")
    return [entry for entry in map(_parse, lines) if entry is not None]


def rewrite_journal(path: Path, entries: Iterable[Entry]) -> None:
    """Write a journal anew, whole or not at all."""
    atomic_write(path, b"".join(map(_line, entries)))


class Journal:
    """A journal that is being written."""

    def __init__(self, path: Path) -> None:
        self._handle = create(path, os.O_WRONLY | os.O_APPEND)

    def append(self, entries: Iterable[Entry]) -> None:
        """Make entries durable. When this fails it must not be tried again: half a line may be there."""
        write_all(self._handle, b"".join(map(_line, entries)))
        sync(self._handle)

    def close(self) -> None:
        """Close the file."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry).encode()
    return _digest(text) + b" " + text + b"\n"


def _parse(line: bytes) -> Entry | None:
    digest_of_line, _, text = line.partition(b" ")
    if digest_of_line != _digest(text):
        return None
    try:
        entry = json_object(text, NAME)
    except InputError:
        return None
    return entry if problem(entry, _FIELDS) is None else None


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode()
