"""One weight file of a job: laid out beforehand, filled in any order, and named when it is complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from svdconvert.jobs.output import OutputFolder
from svdconvert.storage.disk import create, pwrite_all, reserve, sync, sync_folder
from svdconvert.storage.headers import file_layout
from svdconvert.tensors import TensorInfo


class ShardFile:
    """One weight file, under its partial name until it is complete.

    Attributes:
        done: tensors that are recorded.
        found: whether an earlier run's file is there, under one of its names and fit to hold what was recorded.
    """

    def __init__(self, output: OutputFolder, name: str, infos: Sequence[TensorInfo]) -> None:
        self.name, self.infos = name, infos
        layout = file_layout(infos)
        self.header, self.starts, self.size = layout.header, layout.starts, layout.size
        self.sizes = {info.name: info.nbytes for info in infos}
        self.done: set[str] = set()
        self.found = False
        self._final = output.folder / name
        self._partial = output.job / f"{name}.partial"
        self._handle = -1
        self._opening = threading.Lock()

    def find(self) -> None:
        """Look for what an earlier run wrote."""
        # Two of them are none: it cannot be known of which one the records are.
        self.found = self._is_whole(self._final) != self._is_whole(self._partial)

    def fit(self, recorded: set[str]) -> None:
        """Make the file fit what is recorded of it."""
        if not self.found:
            self._partial.unlink(missing_ok=True)
        elif self._is_whole(self._final):
            self._partial.unlink(missing_ok=True)
            if not self.sizes.keys() <= recorded:
                os.replace(self._final, self._partial)
                sync_folder(self._partial.parent)
                sync_folder(self._final.parent)

    def _is_whole(self, path: Path) -> bool:
        """Whether a file is there that has the size and the header of this one."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as handle:
            return handle.read(len(self.header)) == self.header

    def is_final(self) -> bool:
        """Whether the file has its final name, and its size."""
        return self._final.is_file() and self._final.stat().st_size == self.size

    def prepare(self) -> None:
        """Reserve the room, unless the file is complete."""
        if not self.is_final() or self._partial.exists():
            self._open()
            self.close()

    def write(self, name: str, data: memoryview, offset: int) -> None:
        assert offset + len(data) <= self.sizes[name]
        pwrite_all(self._open(), data, self.starts[name] + offset)

    def _open(self) -> int:
        with self._opening:
            if self._handle < 0:
                handle = create(self._partial, os.O_RDWR)
                try:
                    if os.fstat(handle).st_size != self.size:
                        reserve(handle, self.size)
                    pwrite_all(handle, self.header, 0)
                except OSError:
                    os.close(handle)
                    raise
                self._handle = handle
            return self._handle

    def sync(self) -> None:
        if self._handle >= 0:
            sync(self._handle)

    def is_full(self, written: Iterable[str] = ()) -> bool:
        """Whether every tensor is recorded, or among those that are written and about to be."""
        return self.sizes.keys() <= self.done | set(written)

    def complete_if_full(self) -> bool:
        """Give the file its final name if every tensor is in it."""
        if not self.is_full() or not self._partial.exists():
            return False
        self.sync()
        self.close()
        os.replace(self._partial, self._final)
        sync_folder(self._final.parent)
        return True

    def close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
