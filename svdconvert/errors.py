"""The two ways a command can fail, and their exit codes.

Every message is one sentence: what is wrong with which file or tensor, and what to do about it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from svdconvert.sentences import Sentence


class SvdconvertError(Exception):
    """Base of all errors that the command line reports without a traceback.

    Attributes:
        sentence: what is wrong and what to do.
        fields: the fields of the request that it names, see :func:`svdconvert.sentences.asked`.
    """

    exit_code = 1

    def __init__(self, text: str) -> None:
        self.sentence = Sentence(text)
        super().__init__(self.sentence)

    @property
    def fields(self) -> tuple[str, ...]:
        return self.sentence.fields

    def told(self, words: Callable[[str, Any], str]) -> str:
        """The sentence with its fields in other words than the library's."""
        return self.sentence.told(words)


class InputError(SvdconvertError):
    """The request cannot be met: a wrong path, rank, file or repository (exit code 2)."""

    exit_code = 2


class JobError(SvdconvertError):
    """The work was interrupted half-way; the same command continues it once the cause is gone (exit code 1)."""

    exit_code = 1


def out_of_memory(error: BaseException) -> str:
    """Whether an error means that memory ran out: of the ``device``, of the ``host``, or empty for neither.

    By name, since torch raises its own types and importing it only to name them costs seconds.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return "device"
    full = getattr(error, "errno", None) == errno.ENOMEM or "can't allocate memory" in str(error)
    return "host" if isinstance(error, MemoryError) or full else ""
