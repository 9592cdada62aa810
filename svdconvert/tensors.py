"""A tensor as a header describes it: name, type, shape, and the place of its bytes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

# safetensors code -> (bytes per element, torch dtype name)
DTYPES: Mapping[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "F32": (4, "float32"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
}


CODES: Mapping[str, str] = {name: code for code, (_, name) in DTYPES.items()}


FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Cut:
    """The bytes of a stored tensor that make up a part of it: the same piece of each of several equal stretches.

    Attributes:
        tensor: name of the stored tensor.
        start: position of the piece in a stretch, in bytes.
        length: size of the piece, in bytes.
        stride: bytes from one stretch to the next.
        turned: whether they are a matrix the other way round: they hold its columns, one after the other.
    """

    tensor: str
    start: int
    length: int
    stride: int
    turned: bool = False

    def runs(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """The part's bytes in the stored tensor: ``(position, length)`` of each run, in order.

        Args:
            offset: position of the first byte in the part.
            size: number of bytes.
        """
        while size:
            stretch, inside = divmod(offset, self.length)
            length = min(self.length - inside, size)
            yield stretch * self.stride + self.start + inside, length
            offset, size = offset + length, size - length


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it.

    Attributes:
        name: key in the checkpoint.
        dtype: safetensors code, for example ``F16``.
        shape: dimensions.
        file: name of the weight file that holds it, relative to the checkpoint folder.
        start: byte position of its data in that file, or -1 where only the file's loader knows (pickled weights).
        cut: for a part of a stored tensor, its bytes; ``start`` is then that of the stored tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    start: int = -1
    cut: Cut | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.size * DTYPES[self.dtype][0]

    def rows(self, begin: int, end: int) -> TensorInfo:
        """Some rows of a stored tensor (its first dimension), to be read as a separate tensor.

        >>> TensorInfo("head", "F16", (10, 4)).rows(2, 5).cut
        Cut(tensor='head', start=16, length=24, stride=80)
        """
        unit = self.nbytes // self.shape[0]
        if self.cut is not None and self.cut.turned:  # of every column, some entries
            size = DTYPES[self.dtype][0]
            start, length, stride = self.cut.start + begin * size, (end - begin) * size, self.shape[0] * size
            cut = replace(self.cut, start=start, length=length, stride=stride)
            return replace(self, shape=(end - begin, *self.shape[1:]), cut=cut)
        cut = Cut(self.name, begin * unit, (end - begin) * unit, self.nbytes)
        if self.cut is not None and self.cut.length == self.nbytes:  # one run of bytes of a stored tensor
            cut = replace(self.cut, start=self.cut.start + begin * unit, length=cut.length)
        return replace(self, shape=(end - begin, *self.shape[1:]), cut=cut)


def parameters(tensors: Iterable[TensorInfo]) -> int:
    """Number of parameters; tensors of integers are buffers."""
    return sum(info.size for info in tensors if info.dtype in FLOATS)


def majority_dtype(infos: Iterable[TensorInfo]) -> str:
    """The torch type that most of the bytes are in."""
    sizes: dict[str, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return DTYPES[max(sizes, key=lambda code: sizes[code])][1]
