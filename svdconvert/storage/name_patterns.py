"""Regular expressions from somebody else's file, matched with names in a time that cannot grow without bound.

Python's own engine backtracks, so that a short pattern can keep it busy for hours. Here all positions that a part of
the pattern can end at are kept at once: the time is at most the length of the pattern times that of the name, squared.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

# Positions in a name -> those that are reached from them.
_Part = Callable[[str, frozenset[int]], frozenset[int]]

_WORD = frozenset(string.ascii_letters + string.digits + "_-")
# How most patterns of names end: few names have to be looked at further.
_END = re.compile(r"((?:\\\.[\w-]+)+)\$$")
_LONGEST, _DEEPEST = 20_000, 3


class NamePattern:
    """A pattern of letters, digits, ``_ - . ^ $``, escaped signs, ``\\d \\w``, groups with ``|``, and ``* + ?``."""

    def __init__(self, text: str) -> None:
        """Read it.

        Raises:
            ValueError: it has something else.
        """
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text):,} characters")
        self._text, self._place, self._depth = text, 0, 0
        first = self._sequence()
        end = None if self._next() == "|" or "\\\\" in text else _END.search(text)
        self._end = "" if end is None else end[1].replace("\\", "")
        self._part = self._either(first)
        if self._place < len(text):
            raise ValueError(text[self._place])

    def matches(self, name: str) -> bool:
        """Whether it matches at the beginning of a name, as :func:`re.match` has it."""
        return name.endswith(self._end) and bool(self._part(name, frozenset({0})))

    def _either(self, first: _Part) -> _Part:
        parts = [first]
        while self._next() == "|":
            self._place += 1
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _any(parts)

    def _sequence(self) -> _Part:
        parts: list[_Part] = []
        while self._next() not in ("", "|", ")"):
            part = self._one()
            sign = self._next()
            if sign and sign in "*+?":
                self._place += 1
                part = _repeated(part, least=sign == "+", most=sign == "?")
            parts.append(part)
        return _in_turn(parts)

    def _one(self) -> _Part:
        sign = self._take()
        if sign == "(":
            return self._group()
        if sign == "\\":
            sign = self._take()
            if sign == "d":
                return _character(str.isdecimal)
            if sign == "w":
                return _character(lambda found: found == "_" or found.isalnum())
            if sign.isalnum() or not sign:
                raise ValueError(f"\\{sign}")
            return _character(sign.__eq__)
        if sign == ".":
            return _character("\n".__ne__)
        if sign == "^":
            return lambda name, places: places & {0}
        if sign == "$":
            return lambda name, places: places & {len(name)}
        if sign not in _WORD:
            raise ValueError(sign)
        return _character(sign.__eq__)

    def _group(self) -> _Part:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError("(")
        if self._text.startswith("?:", self._place):
            self._place += 2
        part = self._either(self._sequence())
        if self._take() != ")":
            raise ValueError("(")
        self._depth -= 1
        return part

    def _next(self) -> str:
        return self._text[self._place : self._place + 1]

    def _take(self) -> str:
        self._place += 1
        return self._text[self._place - 1 : self._place]


def exactly(name: str) -> NamePattern:
    """The pattern of one name."""
    return NamePattern(re.sub(r"\W", r"\\\g<0>", name) + "$")


def _character(fits: Callable[[str], bool]) -> _Part:
    return lambda name, places: frozenset(at + 1 for at in places if at < len(name) and fits(name[at]))


def _any(parts: Sequence[_Part]) -> _Part:
    return lambda name, places: frozenset().union(*(part(name, places) for part in parts))


def _in_turn(parts: Sequence[_Part]) -> _Part:
    def reached(name: str, places: frozenset[int]) -> frozenset[int]:
        for part in parts:
            if not places:
                break
            places = part(name, places)
        return places

    return reached


def _repeated(part: _Part, *, least: bool, most: bool) -> _Part:
    """A part that may be missing unless ``least``, and may be repeated unless ``most``."""

    def reached(name: str, places: frozenset[int]) -> frozenset[int]:
        found = part(name, places)
        if not most:
            while not (more := part(name, found)) <= found:
                found |= more
        return found if least else found | places

    return reached
