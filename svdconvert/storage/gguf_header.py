"""The GGUF container of llama.cpp: its metadata and the places of its tensors, without touching the data.

Format, specified in https://github.com/ggml-org/ggml: the magic bytes and the version, the counts of tensors and of
metadata entries, the entries, the tensors' names, shapes, types and offsets, and the data from the next multiple of the
alignment on. Every count and length comes from outside, so each is compared with the bytes that are left before
anything is read or allocated for it.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.fields import short
from svdconvert.storage.documents import open_regular, reading
from svdconvert.storage.headers import check_name
from svdconvert.words import listing

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Vocabularies of half a million tokens, with their merges, take a tenth of it.
MAX_HEADER_BYTES = 256_000_000
# Chat templates are the longest texts.
_MAX_TEXT = 16_000_000
# Keys are words with dots between them; they are shown in messages.
_MAX_KEY = 200
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**20
_MAX_ENTRIES, _MAX_TENSORS = 65_536, 1_000_000
# Longer lists are counted and not kept.
_KEPT = 1024

_TEXT, _LIST = 8, 9
# Types of metadata: their form in `struct`.
_NUMBERS: Mapping[int, str] = {number: form for number, form in enumerate("BbHhIif?  Qqd") if form != " "}

# GGML's types: number -> (name, elements of a block, bytes of a block).
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: as the file has it.
        kind: its type's number, row of :data:`TYPES`.
        shape: dimensions as torch orders them; the file has them the other way round.
        start: byte position of its data in the file.
        nbytes: bytes of its data.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def type(self) -> str:
        """Name of its type: ``Q4_K``."""
        return TYPES[self.kind][0]


@dataclass(frozen=True)
class Counted:
    """A list in the metadata that is too long to be kept, a vocabulary say.

    Attributes:
        length: number of its entries.
    """

    length: int


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the data of a file.

    Attributes:
        metadata: key -> number, text, flag, short list, or :class:`Counted`.
        tensors: by name, in the order of their data.
        data: byte position of the first tensor's data, at or beyond the header's end.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a local file.

    Raises:
        InputError: it is not GGUF, is truncated or damaged, or has tensors of a type that is not known.
    """
    with reading(path), open_regular(path, advice="put the weight file in its place") as handle:
        size = handle.seek(0, 2)
        handle.seek(0)
        return _Parser(io.BufferedReader(handle, 2**20), path, size).parse()


class _Parser:
    """Reads a header from front to back."""

    def __init__(self, stream: io.BufferedReader, path: Path, size: int) -> None:
        self._stream, self._path, self._size, self._at = stream, path, size, 0

    def parse(self) -> GgufHeader:
        if self._size < 4 or self._take(4) != MAGIC:
            raise InputError(f"{self._path} is not a GGUF file; fetch it again")
        version = self._number("I")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "for machines of the other byte order" if swapped else f"of version {version}"
            raise InputError(f"{self._path} is a GGUF file {what}, which is not supported; make it again")
        tensor_count, count = self._number("Q"), self._number("Q")
        if count > _MAX_ENTRIES or tensor_count > _MAX_TENSORS:
            raise self._damaged(f"it claims {count:,} entries and {tensor_count:,} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(65_535, "a key")
            if len(key) > _MAX_KEY or not key.isprintable():
                raise self._damaged(f"{short(key)} is no key")
            if key in metadata:
                raise self._damaged(f"{key} stands in it twice")
            metadata[key] = self._value(self._number("I"), key)
        entries = [self._entry() for _ in range(tensor_count)]
        return self._place(metadata, entries)

    def _place(
        self, metadata: Mapping[str, Any], entries: Sequence[tuple[str, int, tuple[int, ...], int]]
    ) -> GgufHeader:
        """Find the data of all tensors, and see that it is there and belongs to one of them only."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"its general.alignment is {str(alignment)[:40]}, not a power of 2")
        data = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = data
        for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                raise self._damaged(f"tensor {name} is in it twice")
            _, elements, size = TYPES[kind]
            nbytes = math.prod(shape) // elements * size
            start = data + offset
            if offset % alignment or start < end:
                raise self._damaged(f"the data of tensor {name} is not in a place of its own")
            end = start + nbytes
            if end > self._size:
                raise InputError(
                    f"{self._path} is truncated or damaged: tensor {name} ends at byte {end:,}, the file has "
                    f"{self._size:,}; fetch it again"
                )
            tensors[name] = GgufTensor(name, kind, shape, start, nbytes)
        return GgufHeader(metadata, tensors, data)

    def _entry(self) -> tuple[str, int, tuple[int, ...], int]:
        """``(name, type, shape, offset)`` of a tensor."""
        name = self._text(65_535, "a tensor's name")
        check_name(name, str(self._path))
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in TYPES:
            raise InputError(
                f"tensor {name} of {self._path} has GGML's type {kind}, which is not known here; types are "
                f"{listing([entry[0] for entry in TYPES.values()], len(TYPES))}"
            )
        type_, elements, _ = TYPES[kind]
        if not all(shape) or math.prod(shape) >= 2**62 or shape[-1] % elements:
            raise self._damaged(f"tensor {name} of type {type_} has the shape {list(shape)}")
        return name, kind, shape, offset

    def _value(self, kind: int, key: str) -> Any:
        if kind == _TEXT:
            return self._text(_MAX_TEXT, key)
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _LIST:
            raise self._damaged(f"{key} is of type {kind}, which there is not")
        kind, length = self._number("I"), self._number("Q")
        if kind == _TEXT:
            self._fits(length * 8, f"entries of {key}")
            kept = [self._text(_MAX_TEXT, key) for _ in range(min(length, _KEPT))]
            for _ in range(length - len(kept)):
                self._take(self._length(_MAX_TEXT, key))
            return kept if len(kept) == length else Counted(length)
        if kind not in _NUMBERS:
            raise self._damaged(f"{key} is a list of type {kind}, which there is not")
        form = _NUMBERS[kind]
        self._fits(length * struct.calcsize(f"<{form}"), f"entries of {key}")
        raw = self._take(length * struct.calcsize(f"<{form}"))
        return list(struct.unpack(f"<{length}{form}", raw)) if length <= _KEPT else Counted(length)

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self, most: int, what: str) -> str:
        raw = self._take(self._length(most, what))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # Tokens may be pieces of a character; keys, names and templates may not.
            return raw.decode("utf-8", errors="replace")

    def _length(self, most: int, what: str) -> int:
        length = int(self._number("Q"))
        if length > most:
            raise self._damaged(f"{what[:80]} claims {length:,} bytes")
        return length

    def _take(self, count: int) -> bytes:
        self._fits(count, "bytes")
        raw = self._stream.read(count)
        self._at += count
        if len(raw) < count:
            raise InputError(f"{self._path} is truncated inside its header; fetch it again")
        return raw

    def _fits(self, count: int, what: str) -> None:
        """See that so many bytes are left of the file, and of what a header may have."""
        if count > self._size - self._at:
            raise InputError(
                f"{self._path} is truncated or damaged: its header claims more {what} than the file has room for; "
                "fetch it again"
            )
        if self._at + count > MAX_HEADER_BYTES:
            raise self._damaged(f"its header has more than {MAX_HEADER_BYTES:,} bytes")

    def _damaged(self, why: str) -> InputError:
        return InputError(f"{self._path} is damaged: {why}; fetch it again")
