"""Tensor data of a GGUF file as the checkpoint has it: quantised blocks multiplied out, llama.cpp's changes undone.

Quantised tensors become float32, by the `gguf` package of llama.cpp; what they stand for is not rounded again. Only
some rows are multiplied out at a time.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svdconvert.errors import InputError
from svdconvert.foreign import foreign_code
from svdconvert.storage.gguf_config import stored_code
from svdconvert.storage.gguf_header import TYPES, GgufTensor
from svdconvert.storage.tensor_data import OpenFile, TensorData
from svdconvert.tensors import TensorInfo

# Bytes that are multiplied out at a time; the package takes several times as much meanwhile.
PIECE = 4 * 2**20

# numpy has no bfloat16; its bytes are only moved.
_NUMPY: Mapping[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class GgufPlace:
    """Where a tensor of the checkpoint is in a file, and what has to be undone.

    Attributes:
        tensor: in the file.
        heads: number of heads whose rows are in the order of llama.cpp's rotation; 0 if they are not.
        offset: whether 1 has been added.
        transposed: whether it is the other way round.
    """

    tensor: GgufTensor
    heads: int = 0
    offset: bool = False
    transposed: bool = False

    def info(self, name: str, file: str) -> TensorInfo:
        """The tensor as the checkpoint has it."""
        # an offset is undone in float32, whose result fits into no shorter type
        code = "F32" if self.offset else stored_code(self.tensor.type)
        shape = tuple(reversed(self.tensor.shape)) if self.transposed else self.tensor.shape
        return TensorInfo(name, code, shape, file, self.tensor.start)

    @property
    def is_plain(self) -> bool:
        """Whether the file has the bytes as the checkpoint would."""
        is_float = stored_code(self.tensor.type) == self.tensor.type
        return is_float and not self.heads and not self.offset and not self.transposed


def need_gguf(where: object) -> None:
    """Refuse to go on without the package that knows GGUF's types.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{where} is read with the package gguf, which is missing; pip install 'svdconvert[gguf]'")


def need_types(kinds: Iterable[int], where: object) -> None:
    """Refuse types that the installed package cannot multiply out, before any work: newer ones need a newer package.

    Args:
        kinds: rows of :data:`~svdconvert.storage.gguf_header.TYPES`.
        where: the model, for the message.

    Raises:
        InputError: there is one.
    """
    for kind in sorted(kinds):
        name, _, size = TYPES[kind]
        if stored_code(name) == name:
            continue
        import gguf

        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), gguf.GGMLQuantizationType(kind))
        except Exception as error:  # whatever it raises for a type that it does not know
            raise InputError(
                f"{where} has weights of the type {name}, which the installed package gguf cannot multiply out; "
                "pip install --upgrade gguf, or give the checkpoint that it was made from"
            ) from error


class GgufData(TensorData):
    """One open file."""

    def __init__(self, path: Path, file: str, places: Mapping[str, GgufPlace]) -> None:
        """Open it.

        Args:
            path: where it is.
            file: its name in messages.
            places: tensor of the checkpoint -> its place; those of other files are not asked for.

        Raises:
            JobError: it cannot be opened.
        """
        self._path, self._places = path, places
        self._file = OpenFile(path, file)
        # the piece that was multiplied out last: (tensor, its first row, rows), its bytes
        self._key: tuple[str, int, int] = ("", 0, 0)
        self._piece = memoryview(b"")

    def fill(self, info: TensorInfo, view: memoryview, place: int) -> None:
        where = self._places[info.name]
        if where.is_plain:
            self._file.read(view, where.tensor.start + place, info.name)
            return
        of_row = info.nbytes // _matrix(where.tensor.shape)[0]
        rows = _rows_at_a_time(where, info)
        if _in_order(where):  # of an embedding, few rows are asked for
            rows = min(rows, -(-len(view) // of_row))
        length = of_row * rows
        done = 0
        while done < len(view):
            number, inside = divmod(place + done, length)
            piece = self._decoded(info, where, number * rows, rows)[inside:]
            count = min(len(piece), len(view) - done)
            view[done : done + count] = piece[:count]
            done += count

    def close(self) -> None:
        self._file.close()
        self._key, self._piece = ("", 0, 0), memoryview(b"")

    def _decoded(self, info: TensorInfo, place: GgufPlace, begin: int, rows: int) -> memoryview:
        """The piece of a tensor that begins with a row, in the type and order in which the checkpoint has it."""
        if self._key != (info.name, begin, rows):
            self._key, self._piece = ("", 0, 0), memoryview(b"")  # not two at a time
            tensor = place.tensor
            height, width = _matrix(tensor.shape)
            values = self._rows(tensor, begin, min(begin + rows, height), width, info.name)
            if place.heads:
                # [heads, pairs, 2, ...] in the file, [heads, 2, pairs, ...] in the checkpoint
                pairs, inner = tensor.shape[0] // place.heads // 2, tensor.shape[1:]
                values = values.reshape(-1, pairs, 2, *inner).swapaxes(1, 2)
            if place.offset:
                values = values.astype(np.float32) - np.float32(1)
            if place.transposed:
                values = values.T
            self._piece = _bytes(np.ascontiguousarray(values))
            self._key = (info.name, begin, rows)
        return self._piece

    def _rows(self, tensor: GgufTensor, begin: int, end: int, width: int, name: str) -> np.ndarray[Any, Any]:
        """Rows of a tensor as the file orders them: [rows, width], floats, quantised ones as float32."""
        _, elements, size = TYPES[tensor.kind]
        length = width // elements * size
        raw = np.empty((end - begin, length), np.uint8)
        self._file.read(_bytes(raw), tensor.start + begin * length, name)
        if stored_code(tensor.type) == tensor.type:
            return raw.view(_NUMPY[tensor.type])
        import gguf

        with (
            foreign_code(f"tensor {name} of {self._path} cannot be multiplied out", "fetch the file again"),
            np.errstate(all="ignore"),
        ):
            found: np.ndarray[Any, Any] = gguf.dequantize(raw, gguf.GGMLQuantizationType(tensor.kind))
        return found


def _rows_at_a_time(place: GgufPlace, info: TensorInfo) -> int:
    """Rows of the file's tensor in a piece: whole heads, and all where the checkpoint has them as columns."""
    height, _ = _matrix(place.tensor.shape)
    rows = max(1, PIECE * height // max(info.nbytes, 1))
    if place.transposed or height == 1:
        return height
    if place.heads:
        of_head = height // place.heads
        return max(1, rows // of_head) * of_head
    return min(rows, height)


def _in_order(place: GgufPlace) -> bool:
    """Whether each row of the file's tensor is one of the checkpoint's, in the same place."""
    return not place.heads and not place.transposed and _matrix(place.tensor.shape)[0] > 1


def _bytes(array: Any) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(rows, columns)``; a vector is one row."""
    return (1, shape[0]) if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])
