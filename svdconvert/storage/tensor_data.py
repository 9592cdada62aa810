"""The data of one weight file: bytes of its tensors into a buffer. Forms that are not plain have their own class."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdconvert.errors import JobError
from svdconvert.tensors import TensorInfo


class TensorData(ABC):
    """An open weight file, for one thread."""

    @abstractmethod
    def fill(self, info: TensorInfo, view: memoryview, place: int) -> None:
        """Read bytes of a tensor.

        Args:
            info: a stored tensor of this file, whole.
            view: gets the bytes.
            place: position in the tensor's data of the first of them.

        Raises:
            JobError: the file cannot be read, or ends too early.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class OpenFile:
    """A file that is read at positions.

    Files are read into buffers instead of being mapped: mapped pages count as the process's memory and cost a page
    fault each.
    """

    def __init__(self, path: Path, file: str) -> None:
        """Open it.

        Args:
            path: where it is.
            file: its name in messages.

        Raises:
            JobError: it cannot be opened.
        """
        self._file = file
        with read_errors(file):
            self._handle = os.open(path, os.O_RDONLY)

    def read(self, view: memoryview, start: int, tensor: str) -> None:
        """Fill a buffer from a position on, with data of a tensor.

        Raises:
            JobError: the file cannot be read, or ends too early.
        """
        done = 0
        while done < len(view):
            with read_errors(self._file):
                count = os.preadv(self._handle, [view[done:]], start + done)
            if count == 0:
                raise JobError(f"{self._file} ended inside tensor {tensor}; fetch the file again")
            done += count

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


class PlainData(TensorData):
    """Data that lies in the file as it is used: safetensors."""

    def __init__(self, path: Path, file: str) -> None:
        """Open the file, see :class:`OpenFile`."""
        self._file = OpenFile(path, file)

    def fill(self, info: TensorInfo, view: memoryview, place: int) -> None:
        self._file.read(view, info.start + place, info.name)

    def close(self) -> None:
        self._file.close()


@contextmanager
def read_errors(file: object) -> Iterator[None]:
    """Turn an operating system's error about a file that a job reads into one sentence.

    Raises:
        JobError: it cannot be read now.
    """
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{file} cannot be read ({error.strerror}); fix that and run the same command to continue"
        ) from None
