"""Tensor data of a source: whole matrices into a buffer, everything else as a stream of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.storage.source import Source
from svdconvert.storage.tensor_data import TensorData
from svdconvert.tensors import DTYPES, TensorInfo

# Bytes of a tensor that are copied, or put into a module, at a time.
CHUNK = 4 * 2**20
# Bytes of a matrix that are turned round at a time.
PANEL = 4 * 2**20


def torch_dtype(code: str) -> torch.dtype:
    """``F16`` -> torch.float16."""
    dtype = getattr(torch, DTYPES[code][1])
    assert isinstance(dtype, torch.dtype)
    return dtype


class WeightReader:
    """Reads tensors of a source, fetching its files as they are needed.

    One reader serves one thread. Use it as a context manager: it keeps the file that it read last open.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = ""
        self._data: TensorData | None = None
        # Kept, as pieces of memory that come and go leave gaps that the process keeps.
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> WeightReader:
        """No file is open yet."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the open file."""
        self.close()

    def read(self, info: TensorInfo, buffer: Tensor) -> Tensor:
        """Read one tensor.

        Args:
            info: the tensor to read.
            buffer: [at least ``info.nbytes``], uint8; the result is a view of it.

        Returns:
            The tensor in its stored type and shape.
        """
        target = buffer[: info.nbytes]
        if info.cut is not None and info.cut.turned:
            self._turn(info, target)
        elif self._source.pickled:
            target.copy_(self._pickled_bytes(info))
        else:
            self._fill(info, as_bytes(target), 0)
        return target.view(torch_dtype(info.dtype)).view(info.shape)

    def stream(self, info: TensorInfo) -> Iterator[Tensor]:
        """The bytes of one tensor in order, as flat uint8 pieces of whole elements.

        Each is valid until the next, of this tensor or of another one.
        """
        if info.cut is not None and info.cut.turned:
            self._turn(info, whole := torch.empty(info.nbytes, dtype=torch.uint8))
            yield from whole.split(CHUNK)
            return
        if self._source.pickled:
            yield from self._pickled_bytes(info).split(CHUNK)
            return
        if len(self._buffer) < min(CHUNK, info.nbytes):
            self._buffer = torch.empty(min(CHUNK, info.nbytes), dtype=torch.uint8)
        for done in range(0, info.nbytes, CHUNK):
            piece = self._buffer[: min(CHUNK, info.nbytes - done)]
            self._fill(info, as_bytes(piece), done)
            yield piece

    def close(self) -> None:
        """Close the open file; reading opens it again."""
        if self._data is not None:
            self._data.close()
        self._file, self._data = "", None

    def _fill(self, info: TensorInfo, view: memoryview, offset: int) -> None:
        if self._data is None or info.file != self._file:
            self.close()
            self._data = self._source.data(info.file)
            self._file = info.file
        # The positions in a Hub file are certain only once it is here.
        known = self._source.tensors
        stored = known.get(info.cut.tensor if info.cut else info.name) or known.get(info.name, info)
        done = 0
        for place, length in info.cut.runs(offset, len(view)) if info.cut else [(offset, len(view))]:
            self._data.fill(stored, view[done : done + length], place)
            done += length

    def _turn(self, info: TensorInfo, target: Tensor) -> None:
        """Read a matrix that is stored by columns, some of them at a time."""
        rows, columns = info.shape
        matrix = target.view(torch_dtype(info.dtype)).view(rows, columns)
        if self._source.pickled:
            matrix.copy_(self._pickled_bytes(info).view(matrix.dtype).view(columns, rows).T)
            return
        length = info.nbytes // columns
        step = max(1, PANEL // length)
        buffer = torch.empty(min(step, columns) * length, dtype=torch.uint8)
        for begin in range(0, columns, step):
            end = min(begin + step, columns)
            piece = buffer[: (end - begin) * length]
            self._fill(info, as_bytes(piece), begin * length)
            matrix[:, begin:end] = piece.view(matrix.dtype).view(end - begin, rows).T

    def _pickled_bytes(self, info: TensorInfo) -> Tensor:
        from svdconvert.storage.pickled import load_pickled

        name = info.cut.tensor if info.cut else info.name
        stored = load_pickled(Path(self._source.path(info.file)))[self._source.stored.get(name, name)]
        data = stored.detach().contiguous().reshape(-1).view(torch.uint8)
        if info.cut is None:
            return data
        cut, place = info.cut, data.storage_offset() + info.cut.start
        return data.as_strided((info.nbytes // cut.length, cut.length), (cut.stride, 1), place).reshape(-1)


class TensorsInTurn(Sequence[Tensor]):
    """Tensors that are read as they are asked for: each is valid until another one is, and is read once until then."""

    def __init__(
        self,
        reader: WeightReader,
        infos: Sequence[TensorInfo],
        device: torch.device,
        reading: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - it has no state
    ) -> None:
        """Nothing is read yet.

        Args:
            reader: of the calling thread.
            infos: the tensors.
            device: where they are to be.
            reading: held while one is read.
        """
        self._reader, self._infos, self._device = reader, infos, device
        self._reading = reading
        self._buffer = torch.empty(max(info.nbytes for info in infos), dtype=torch.uint8)
        self._last: tuple[int, Tensor] | None = None

    @property
    def place(self) -> int:
        """Which was read last."""
        return 0 if self._last is None else self._last[0]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._infos)

    def __getitem__(self, place: Any) -> Any:
        """One of them, by its number."""
        if self._last is None or self._last[0] != place:
            info, self._last = self._infos[place], None
            with self._reading:
                self._last = (place, self._reader.read(info, self._buffer).to(self._device))
        return self._last[1]


class Turned(Sequence[Tensor]):
    """Matrices that are stored the other way round, turned as they are asked for."""

    def __init__(self, stored: Sequence[Tensor]) -> None:
        """Nothing is turned yet."""
        self._stored = stored

    def __len__(self) -> int:
        """How many there are."""
        return len(self._stored)

    def __getitem__(self, place: Any) -> Any:
        """One of them, by its number."""
        return self._stored[place].T


def same_values(source: Source, first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two matrices of a source hold the same numbers, in any types; read piece by piece.

    Raises:
        JobError: a file cannot be read.
    """
    if first.shape != second.shape:
        return False
    step = max(1, CHUNK * first.shape[0] // max(first.nbytes, second.nbytes, 1))
    buffers = [torch.empty(step * info.nbytes // info.shape[0], dtype=torch.uint8) for info in (first, second)]
    with WeightReader(source) as reader, WeightReader(source) as other_reader:
        for begin in range(0, first.shape[0], step):
            end = min(begin + step, first.shape[0])
            one = reader.read(first.rows(begin, end), buffers[0])
            other = other_reader.read(second.rows(begin, end), buffers[1])
            if one.dtype != other.dtype:
                one, other = one.double(), other.double()
            if not torch.equal(one, other):
                return False
    return True


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
