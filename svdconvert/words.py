"""Lists, sizes and shares as text, and sizes from text."""

from __future__ import annotations

import re

from svdconvert.errors import InputError
from svdconvert.sentences import asked

_UNITS = {"": 1, "b": 1} | {
    unit + suffix: base**power
    for power, unit in enumerate(("k", "m", "g", "t"), 1)
    for base, suffixes in ((1000, ("", "b")), (1024, ("i", "ib")))
    for suffix in suffixes
}


def parse_size(text: str | int) -> int:
    """Bytes of a size in words: ``5GB`` is 5,000,000,000, ``5GiB`` 5 * 2**30, a plain number counts bytes.

    An integer is returned unchanged.

    Raises:
        InputError: it is not a size, or is implausibly small.
    """
    if isinstance(text, int):
        return text
    size = byte_count(text)
    if size is None or size < 1000:
        raise InputError(f"{asked('max_shard_size', text)} is not a size; write for example 5GB, 500MB or 2GiB")
    return size


def byte_count(text: str) -> int | None:
    """Bytes of a size in words, as :func:`parse_size` reads it; None where it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = _UNITS.get(match[2]) if match else None
    return round(float(match[1]) * unit) if match and unit else None


def size_text(size: int) -> str:
    """The shortest way to write a number of bytes that :func:`parse_size` reads."""
    names = {"TB": 1000**4, "GB": 1000**3, "MB": 1000**2, "kB": 1000}
    names |= {"TiB": 1024**4, "GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
    ways = [f"{size // count}{name}" for name, count in names.items() if size % count == 0]
    return min([*ways, str(size)], key=len)


def numbered(count: int, one: str, many: str = "") -> str:
    """``1 target``, ``2,000 targets``; the plural is given where an s does not make it."""
    return f"1 {one}" if count == 1 else f"{count:,} {many or one + 's'}"


def listing(names: list[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def size(count: float) -> str:
    """Bytes in decimal units, as the Hub counts."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def percent(share: float) -> str:
    """A share in per cent: ``97.7%``, or ``99.982%`` where the first digits would all be nines."""
    return f"{share:.1%}" if share < 0.999 else f"{share:.3%}"
