"""Activations and gradients between the blocks of a model, in files, while all blocks are run one after the other."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.errors import JobError
from svdconvert.fields import NUMBER, OBJECT, POSITIVE, optional, problem, record
from svdconvert.nats import perplexity
from svdconvert.storage.disk import atomic_write, create, disk_errors, refuse_full, sync, sync_folder, write_all
from svdconvert.storage.documents import fill, in_json_types, json_or_none, open_regular
from svdconvert.storage.reader import as_bytes
from svdconvert.storage.tensor_data import read_errors


@dataclass(frozen=True)
class Loss:
    """The model's loss on the calibration text, against the text's own tokens.

    Attributes:
        nll: sum of -log p over the predicted tokens, in nats.
        tokens: number of predicted tokens: all but padding and the first of each sequence.
    """

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per predicted token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return perplexity(self.mean)


# A loss in a document.
LOSS = record({"nll": NUMBER, "tokens": POSITIVE})
_STATE = {"key": OBJECT, "loss": optional(LOSS)}


class ActivationStore:
    """Activations and gradients at the boundaries of blocks, [N, length, hidden] each, in files.

    Plain bytes, written from front to back; a file gets its name when it is complete. Files of another key are removed.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self._shape, self._dtype = folder, shape, dtype
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._size = shape[0] * self._row_bytes
        self._key = in_json_types(key)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            state = json_or_none(folder / "state.json")
            if state is None or problem(state, _STATE) is not None or state["key"] != self._key:
                self._remove_files()
                state = {"key": self._key, "loss": None}
                atomic_write(folder / "state.json", json.dumps(state).encode())
        self._loss = state.get("loss")

    @property
    def loss(self) -> Loss | None:
        """The loss that an earlier run measured."""
        return None if self._loss is None else Loss(**self._loss)

    @loss.setter
    def loss(self, loss: Loss) -> None:
        self._loss = asdict(loss)
        with disk_errors(self.folder):
            atomic_write(self.folder / "state.json", json.dumps({"key": self._key, "loss": self._loss}).encode())

    def missing_bytes(self, copies: int) -> int:
        """Bytes that are still to be written for so many files."""
        return max(copies - len(list(self.folder.glob("*.bin"))), 0) * self._size

    def has(self, name: str) -> bool:
        """Whether a file is complete."""
        path = self._path(name)
        return path.is_file() and path.stat().st_size == self._size

    def read(self, name: str, batch: slice) -> Tensor:
        """Sequences of a complete file: [batch, length, hidden]."""
        begin, end, _ = batch.indices(self._shape[0])
        rows = torch.empty((end - begin, *self._shape[1:]), dtype=self._dtype)
        read_into(rows, self._path(name), begin * self._row_bytes)
        return rows

    @contextmanager
    def writing(self, name: str, *, dry: bool = False) -> Iterator[Callable[[Tensor], None]]:
        """Write a file, sequence by sequence; it gets its name at the end. ``dry`` writes nothing."""
        if dry:
            yield lambda rows: None
            return
        partial = self.folder / f"{name}.partial"
        with disk_errors(self.folder):
            handle = create(partial, os.O_WRONLY | os.O_TRUNC)

        def write(rows: Tensor) -> None:
            view = as_bytes(rows.detach().to(device="cpu", dtype=self._dtype).contiguous())
            with disk_errors(self.folder):
                write_all(handle, view)

        try:
            yield write
            with disk_errors(self.folder):
                sync(handle)
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        with disk_errors(self.folder):
            os.close(handle)
            os.replace(partial, self._path(name))
            sync_folder(self.folder)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with disk_errors(self.folder):
            self._path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all files; the loss stays."""
        with disk_errors(self.folder):
            self._remove_files()

    def _remove_files(self) -> None:
        for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.partial")]:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"


def check_room(copies: Mapping[ActivationStore, int], more: int = 0) -> None:
    """Compare the bytes to be written into folders of one disk with its free space.

    Args:
        copies: store, one for each folder -> files that it holds at a time.
        more: bytes of statistics that wait beside them.

    Raises:
        InputError: it does not fit.
    """
    folder = next(iter(copies)).folder
    needed = sum(store.missing_bytes(count) for store, count in copies.items()) + more
    what = " for activations and for statistics of experts" if more else " for activations"
    refuse_full(folder, needed, what, "use fewer or shorter sequences, or free some")


def read_into(tensor: Tensor, path: Path, position: int) -> None:
    """Read a tensor's bytes from a position in a file.

    Raises:
        JobError: it cannot be read, or is too short.
    """
    with read_errors(path), open_regular(path) as handle:
        handle.seek(position)
        if not fill(handle, as_bytes(tensor)):
            raise JobError(f"{path} is truncated; delete it and run the same command to continue")
