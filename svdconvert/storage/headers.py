"""The safetensors container: reading and laying out headers without touching the data.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors back to back
(https://huggingface.co/docs/safetensors). Headers alone hold everything a plan needs, locally or over HTTP, and laying
out the header first lets the data be written in any order with bounded memory.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.fields import COUNT, TEXT, Kind, few, problem, table
from svdconvert.sentences import printable
from svdconvert.storage.documents import open_regular, parse_json, reading
from svdconvert.tensors import DTYPES, TensorInfo

# The reference implementation refuses larger headers, so a greater length means that this is not a safetensors file.
MAX_HEADER_BYTES = 100_000_000
# Names become file names of decompositions and refits, with a suffix; file systems allow 255 bytes.
MAX_NAME = 200
# torch supports no more.
MAX_DIMENSIONS = 64

_ENTRY: Mapping[str, Kind] = {
    "dtype": TEXT,
    "shape": few(COUNT, 0, MAX_DIMENSIONS),
    "data_offsets": few(COUNT, 2, 2),
}


def parse_header(raw: bytes, file: str, file_size: int | None = None) -> list[TensorInfo]:
    """Parse a header.

    Args:
        raw: the file's first bytes, at least 8 + header length of them.
        file: name used in the result and in messages.
        file_size: size of the whole file in bytes; None skips the check that the data is complete.

    Returns:
        The tensors in the order of their data.

    Raises:
        InputError: the bytes are not a safetensors header, or disagree with themselves or with the file's size.
    """
    if len(raw) < 8:
        raise InputError(f"{file} is truncated: {len(raw)} bytes are too few for a safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", raw[:8])
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise InputError(f"{file} is not a safetensors file (its header length reads {length}); fetch it again")
    if len(raw) < 8 + length:
        raise InputError(f"{file} is truncated inside its header; fetch it again")
    header = parse_json(bytes(raw[8 : 8 + length]), f"the header of {file}", unique=True)
    if not isinstance(header, dict):
        raise InputError(f"{file} has a header that is not a JSON object; fetch it again")
    if not table(TEXT).fits(header.pop("__metadata__", {})):
        raise InputError(f"{file} has a damaged header: its __metadata__ is not a table of strings; fetch it again")
    data = 8 + length
    position = data
    tensors = []
    entries = [_entry(name, entry, file, data) for name, entry in header.items()]
    for begin, end, info in sorted(entries, key=lambda entry: entry[:2]):
        if begin != position or end - begin != info.nbytes:
            raise InputError(f"{file} has a damaged header at tensor {info.name}; fetch it again")
        position = end
        tensors.append(info)
    if file_size is not None and position != file_size:
        raise InputError(
            f"{file} is truncated or damaged: its header promises {position:,} bytes, "
            f"the file has {file_size:,}; fetch it again"
        )
    return tensors


def check_name(name: str, file: str) -> None:
    """Refuse a tensor name that is too long for a file system, or that cannot be printed.

    Raises:
        InputError: naming the file.
    """
    if not name.isprintable():
        raise InputError(
            f"{file} has a tensor whose name holds characters that cannot be printed ({printable(name, 80)}); "
            "fetch it again"
        )
    if not 0 < len(name.encode()) <= MAX_NAME:
        raise InputError(
            f"{file} has a tensor whose name has {len(name.encode()):,} bytes ({name[:40]}...); 1 to {MAX_NAME} are "
            "possible"
        )


def _entry(name: str, entry: Any, file: str, data: int) -> tuple[int, int, TensorInfo]:
    """``(begin, end, tensor)`` of one entry, bytes counted from the file's start."""
    check_name(name, file)
    wrong = problem(entry, _ENTRY)
    if wrong is not None:
        raise InputError(f"{file} has a header that cannot be read at tensor {name} ({wrong}); fetch it again")
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"tensor {name} in {file} has the unsupported type {entry['dtype'][:40]}; "
            "convert from an unquantised float16, bfloat16 or float32 checkpoint"
        )
    begin, end = entry["data_offsets"]
    return data + begin, data + end, TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, data + begin)


def read_header(path: Path, file: str | None = None) -> list[TensorInfo]:
    """Read the header of a local safetensors file. See :func:`parse_header`."""
    with reading(path), open_regular(path, advice="put the weight file in its place") as handle:
        raw, size = header_bytes(handle), handle.seek(0, 2)
    return parse_header(raw, file or path.name, size)


def header_bytes(handle: io.FileIO) -> bytes:
    """The length of a header and the header itself, or as much as the file has; not parsed yet."""
    raw = handle.read(8)
    return raw + handle.read(min(struct.unpack("<Q", raw)[0], MAX_HEADER_BYTES)) if len(raw) == 8 else raw


@dataclass(frozen=True)
class FileLayout:
    """The layout of a file to be written.

    Attributes:
        header: the first bytes of the file.
        starts: byte position of each tensor, by name.
        size: bytes of the whole file.
    """

    header: bytes
    starts: Mapping[str, int]
    size: int


def file_layout(tensors: Iterable[TensorInfo], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Lay out one file, with metadata if given.

    Wider types come first, so that every tensor is aligned to its own element size without gaps, which the format
    forbids.
    """
    ordered: Sequence[TensorInfo] = sorted(tensors, key=lambda info: -DTYPES[info.dtype][0])
    # transformers before 5 insists on "format": "pt".
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    begins = {}
    for info in ordered:
        begins[info.name] = position
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    starts = {name: data + begin for name, begin in begins.items()}
    return FileLayout(struct.pack("<Q", len(text)) + text, starts, data + position)
