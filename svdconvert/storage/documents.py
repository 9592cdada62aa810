"""Bounded reading of files that somebody else may have written: regular files, their bytes, and JSON.

Every document that a command reads goes through here (weights: ``storage/headers.py``, ``storage/pickled.py``). Files
that could block or never end are not opened, text that could exhaust the stack or the memory is not parsed, and every
fault of a file becomes one sentence.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError

# An index of a million tensors, or a tokenizer of a million entries, is smaller; a config is a thousandth of it.
MAX_JSON_BYTES = 256_000_000
# Far deeper than any file of a model; Python's own parser gives up at about a thousand.
MAX_JSON_DEPTH = 64
# Each value takes up to about 100 bytes of memory.
MAX_JSON_VALUES = 10_000_000
# Texts and side files.
MAX_FILE_BYTES = 4_000_000_000
# Texts are read more than once, so a pipe will not do.
TEXT_ADVICE = "write the text to a file and give that"

# Never fails once it has begun, so it takes linear time: an unfinished string extends to the end.
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NO_BRACKET = re.compile(r"[^\[\]{}]+")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: Path, limit: int | None = None, *, advice: str = "give a regular file") -> io.FileIO:
    """Open a regular file, unbuffered; a pipe or a device is refused without waiting.

    Args:
        path: the file.
        limit: largest size allowed, in bytes.
        advice: what to do about a file that is not regular or too large.

    Raises:
        FileNotFoundError: it does not exist.
        InputError: it cannot be read, is not a regular file, or is too large.
    """
    try:
        # O_NONBLOCK: otherwise opening a pipe waits until somebody writes to it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    status = os.fstat(handle)
    wrong = None
    if not stat.S_ISREG(status.st_mode):
        wrong = f"{path} cannot be read: it is {_kind(status.st_mode)}, not a regular file; {advice}"
    elif limit is not None and status.st_size > limit:
        wrong = f"{path} has {status.st_size:,} bytes, more than the {limit:,} that such a file may have; {advice}"
    if wrong:
        os.close(handle)
        raise InputError(wrong)
    return io.FileIO(handle, "rb")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an operating system's error while reading into one sentence.

    Raises:
        InputError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def fill(handle: io.FileIO, view: memoryview) -> bool:
    """Fill a buffer from a file; False where the file ends too early."""
    while view:
        count = handle.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def read_bytes(
    path: Path, missing: str, limit: int = MAX_FILE_BYTES, *, advice: str = "put the right file in its place"
) -> bytes:
    """A file's content.

    Args:
        path: the file.
        missing: the message if it does not exist.
        limit: largest size allowed, in bytes.
        advice: what to do about a file that is not regular or too large.

    Raises:
        InputError: it is missing, cannot be read, is not a regular file, or is too large.
    """
    try:
        handle = open_regular(path, limit, advice=advice)
    except FileNotFoundError:
        raise InputError(missing) from None
    data = bytearray()
    with reading(path), handle:
        while len(data) <= limit and (piece := handle.read(min(1 << 24, limit + 1 - len(data)))):
            data += piece
    if len(data) > limit:  # it grew while it was read
        raise InputError(f"{path} has more than the {limit:,} bytes that such a file may have")
    return bytes(data)


def read_text(path: Path, missing: str, limit: int = MAX_FILE_BYTES) -> str:
    """A user's UTF-8 text. Raises as :func:`read_bytes`, and where it is not UTF-8."""
    try:
        return read_bytes(path, missing, limit, advice=TEXT_ADVICE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None


def read_json(path: Path, missing: str, advice: str = "fetch it again") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        missing: the message if it does not exist.
        advice: what to do about a damaged file.

    Raises:
        InputError: the file is missing, unreadable, not a regular file, too large, or not a JSON object.
    """
    return json_object(read_bytes(path, missing, MAX_JSON_BYTES), path, advice)


def json_or_none(path: Path) -> dict[str, Any] | None:
    """A JSON object that svdconvert wrote; None where it is missing or damaged, and will be written again."""
    try:
        return read_json(path, "")
    except InputError:
        return None


def json_bytes(value: Any) -> bytes:
    """A document of a result as it is written."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def in_json_types(value: Any) -> Any:
    """A value as JSON gives it back: tuples as lists, keys as text. For comparing it with what was read."""
    return json.loads(json.dumps(value))


def json_object(data: bytes, where: object, advice: str = "fetch it again") -> dict[str, Any]:
    """:func:`parse_json`, of an object."""
    value = parse_json(data, where, advice)
    if not isinstance(value, dict):
        raise InputError(f"{where} does not hold a JSON object; {advice}")
    return value


def parse_json(data: bytes | str, where: object, advice: str = "fetch it again", *, unique: bool = False) -> Any:
    """Parse JSON.

    Args:
        data: the text, in UTF-8.
        where: what to call it.
        advice: what to do if it is damaged.
        unique: refuse a key that occurs twice in an object; otherwise the last one counts, as usual.

    Raises:
        InputError: it is not JSON, nested deeper than :data:`MAX_JSON_DEPTH`, has more than :data:`MAX_JSON_VALUES`
            values, or text that cannot be written.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}); {advice}") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(text) > MAX_JSON_DEPTH:
        raise InputError(
            f"{where} is nested more than {MAX_JSON_DEPTH} levels deep, too deep for such a file; {advice}"
        )
    if text.count(",") + text.count("[") + text.count("{") > MAX_JSON_VALUES:
        raise InputError(f"{where} has more than {MAX_JSON_VALUES:,} values, too many for such a file; {advice}")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half a surrogate pair, which is not text; {advice}") from None
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}); {advice}") from None
    return value


def _depth(text: str) -> int:
    """How deep a JSON text is nested, without parsing it."""
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text))
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in table if keys.count(key) > 1)!r} stands in it twice")
    return table


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "a device")
