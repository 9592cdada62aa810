"""Tensor data of weight files in which weights are packed: multiplied out, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from svdconvert.storage.packed import Place
from svdconvert.storage.tensor_data import PlainData, TensorData
from svdconvert.tensors import DTYPES, TensorInfo

# Bytes that are multiplied out at a time; some times as much is needed meanwhile.
PIECE = 2**20


class PackedRows(Protocol):
    """Rows of numbers that are stored in another form, as `packed.py` and `mxfp4.py` know them."""

    @property
    def place(self) -> Place:
        """Where they are."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)``."""

    @property
    def code(self) -> str:
        """Type of the numbers as they are read."""

    def values(self, rows: Callable[[TensorInfo], Tensor]) -> Tensor:
        """Some rows; the argument reads those of a tensor."""


class PackedData(TensorData):
    """One open file, and others that scales may lie in."""

    def __init__(self, path: Callable[[str], Path], file: str, packed: Mapping[Place, PackedRows]) -> None:
        """Open it.

        Args:
            path: file -> where it is.
            file: its name.
            packed: what stands for weights, by their places; everything else lies in the file as it is used.

        Raises:
            JobError: it cannot be opened.
        """
        self._path, self._packed = path, packed
        self._files = {file: PlainData(path(file), file)}
        # the piece that was multiplied out last: (place, its first row), its bytes
        self._key: tuple[Place, int] = (("", 0), 0)
        self._piece = memoryview(b"")

    def fill(self, info: TensorInfo, view: memoryview, place: int) -> None:
        packed = self._packed.get((info.file, info.start))
        if packed is None:
            self._file(info.file).fill(info, view, place)
            return
        height, width = packed.shape
        of_row = width * DTYPES[packed.code][0]
        rows = max(1, PIECE // of_row)
        length, done = of_row * rows, 0
        while done < len(view):
            number, inside = divmod(place + done, length)
            piece = self._decoded(packed, number * rows, min(height, (number + 1) * rows))[inside:]
            count = min(len(piece), len(view) - done)
            view[done : done + count] = piece[:count]
            done += count

    def close(self) -> None:
        for data in self._files.values():
            data.close()
        self._key, self._piece = (("", 0), 0), memoryview(b"")

    def _file(self, file: str) -> PlainData:
        if file not in self._files:
            self._files[file] = PlainData(self._path(file), file)
        return self._files[file]

    def _decoded(self, packed: PackedRows, begin: int, end: int) -> memoryview:
        """The bytes of some rows."""
        if self._key != (packed.place, begin):
            self._piece = _bytes(packed.values(lambda info: self._rows(info, begin, end)).contiguous())
            self._key = (packed.place, begin)
        return self._piece

    def _rows(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        rows = torch.empty((end - begin, *info.shape[1:]), dtype=getattr(torch, DTYPES[info.dtype][1]))
        length = info.nbytes // info.shape[0]
        self._file(info.file).fill(replace(info, cut=None), _bytes(rows), begin * length)
        return rows


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
