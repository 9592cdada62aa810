"""The fields that a document of svdconvert must hold, each with its kind: one table per document, no code.

>>> problem({"step": "a", "tensors": [1]}, {"step": TEXT, "tensors": many(TEXT)})
"its 'tensors' is [1], not a list of text"
>>> problem({"step": "a"}, {"step": TEXT, "tensors": many(TEXT)})
"it has no 'tensors'"
>>> problem({"step": "a"}, {"step": TEXT, "seed": optional(WHOLE)}) is None
True
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.errors import InputError


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        name: for messages.
        fits: whether a value is of this kind.
        needed: whether the field is required.
    """

    name: str
    fits: Callable[[Any], bool]
    needed: bool = True


def _number(value: Any) -> bool:
    # An integer beyond float64 cannot be computed with.
    return (type(value) is int and abs(value) < 2**1000) or (type(value) is float and math.isfinite(value))


TEXT = Kind("text", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", lambda value: type(value) is int and abs(value) < 2**63)
COUNT = Kind("a count", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Kind("a number", _number)
POSITIVE = Kind("a number above 0", lambda value: _number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def many(kind: Kind) -> Kind:
    """A list of values of a kind."""
    return Kind(f"a list of {kind.name}", lambda value: isinstance(value, list) and all(map(kind.fits, value)))


def few(kind: Kind, least: int, most: int) -> Kind:
    """A list of ``least`` to ``most`` values of a kind."""
    size = str(most) if least == most else f"{least} to {most}"
    return Kind(
        f"a list of {size} of {kind.name}", lambda value: many(kind).fits(value) and least <= len(value) <= most
    )


def table(kind: Kind) -> Kind:
    """An object whose values are of a kind."""
    return Kind(
        f"an object of {kind.name}", lambda value: isinstance(value, dict) and all(map(kind.fits, value.values()))
    )


def record(fields: Mapping[str, Kind]) -> Kind:
    """An object with given fields."""
    return Kind("an object with the fields it should have", lambda value: problem(value, fields) is None)


def either(*kinds: Kind) -> Kind:
    """One of several kinds."""
    return Kind(" or ".join(kind.name for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds))


def nullable(kind: Kind) -> Kind:
    """A field that may be null."""
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.fits(value))


def optional(kind: Kind) -> Kind:
    """A field that may be null or missing."""
    return replace(nullable(kind), needed=False)


def problem(document: Any, fields: Mapping[str, Kind]) -> str | None:
    """The first fault of a document, as the end of a sentence about it; None if there is none.

    Other fields are ignored.
    """
    if not isinstance(document, dict):
        return f"it is {short(document)}, not an object"
    for name, kind in fields.items():
        if name not in document:
            if kind.needed:
                return f"it has no {name!r}"
        elif not kind.fits(document[name]):
            return f"its {name!r} is {short(document[name])}, not {kind.name}"
    return None


def require(document: Any, fields: Mapping[str, Kind], where: object, advice: str) -> None:
    """Refuse a document that lacks a field or has one of another kind.

    Args:
        document: the document, parsed.
        fields: the fields it must hold.
        where: its name in the message.
        advice: what to do about it.

    Raises:
        InputError: naming the field.
    """
    wrong = problem(document, fields)
    if wrong is not None:
        raise InputError(f"{where} is damaged: {wrong}; {advice}")


def short(value: Any, most: int = 60) -> str:
    """A value for a message, in JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:  # a number with thousands of digits
        text = type(value).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
