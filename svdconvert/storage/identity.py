"""Identity of files: their content, not their time of writing."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from svdconvert.storage.documents import open_regular, read_bytes, reading
from svdconvert.storage.headers import header_bytes
from svdconvert.tensors import TensorInfo

# Of every tensor so many bytes of its beginning, middle and end are looked at, and of a file without a header as many
# of each of so many places.
BLOCK, PLACES = 4096, 64

# If this is set, every byte counts, which costs as much as reading the model once more.
FULL = "SVDCONVERT_FULL_DIGEST"


def weights_digest(path: Path, tensors: Iterable[TensorInfo]) -> str:
    """Size of a weight file and a digest of its header and of samples of all tensors; of all bytes where asked.

    A torch pickle has checksums of its content, which are used instead.

    Args:
        path: the file.
        tensors: the tensors in it.

    Raises:
        InputError: it cannot be read.
    """

    def archived(handle: io.FileIO) -> bytes:
        return repr(_archived(path)).encode()

    starts = [(info.start, info.nbytes) for info in tensors if info.start >= 0]
    return sampled_digest(path, starts or None, header_bytes if starts else archived)


def sampled_digest(path: Path, starts: Iterable[tuple[int, int]] | None, header: Callable[[io.FileIO], bytes]) -> str:
    """Size of a weight file and a digest of its header and of samples of its data; of all bytes where asked.

    Args:
        path: the file.
        starts: ``(position, bytes)`` of each tensor's data; None where only the file's loader knows.
        header: reads what stands before the data.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with reading(path), open_regular(path) as handle:
        count = os.fstat(handle.fileno()).st_size
        if os.environ.get(FULL):
            while piece := handle.read(2**24):
                digest.update(piece)
            return f"{count}-all-{digest.hexdigest()}"
        digest.update(header(handle))
        for start, length in sorted(starts or [(count * place // PLACES, 1) for place in range(PLACES)]):
            last = max(length - BLOCK, 0)
            for offset in dict.fromkeys((0, last // 2, last)):
                handle.seek(start + offset)
                digest.update(handle.read(min(BLOCK, max(length, 1))))
    return f"{count}-{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """Size and digest of a small file.

    Raises:
        InputError: it cannot be read.
    """
    data = read_bytes(path, f"{path} is missing")
    return f"{len(data)}-{hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _archived(path: Path) -> list[tuple[str, int, int, int]]:
    """Names, checksums, sizes and places in a zip archive; empty where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [(file.filename, file.CRC, file.file_size, file.header_offset) for file in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return []
