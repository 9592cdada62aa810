"""The difference between the settings of earlier work and the present ones, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from svdconvert.errors import InputError

# Longest value, in characters, that a sentence shows.
_LONGEST = 60


def difference(theirs: Mapping[str, object], ours: Mapping[str, object]) -> tuple[str, str] | None:
    """The first field that differs.

    Returns:
        ``(field, "was, now is")``: ``("rank", "8, now 16")``, and within a field that has fields of its own
        ``("weights", "model.safetensors: 10-abc, now 10-abd")``; None if there is none.

    >>> difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ('b', 'c: 2, now 3')
    """
    for field in dict.fromkeys([*ours, *theirs]):
        old, new = theirs.get(field), ours.get(field)
        if _text(old) != _text(new):
            return field, _within(old, new)
    return None


def refuse_other_settings(
    theirs: Mapping[str, object],
    ours: Mapping[str, object],
    begun: str,
    advice: str,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse to continue or use something made with other settings.

    Args:
        theirs: the settings it was made with, in JSON types.
        ours: the present settings, likewise.
        begun: the sentence up to the field that differs, ``DIR was computed with``.
        advice: its end, in the imperative.
        names: field -> how the sentence calls another one of it; by default ``another rank`` of ``rank``.

    Raises:
        InputError: a field differs; it is named, with both values.
    """
    differing = difference(theirs, ours)
    if differing is not None:
        field, values = differing
        name = names.get(field, f"another {field.replace('_', ' ')}")
        raise InputError(f"{begun} {name} ({values}); {advice}")


def _within(old: object, new: object) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        differing = difference(old, new)
        assert differing is not None
        return ": ".join(differing)
    first, second = _text(old), _text(new)
    same = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        same += 1
    # so that long values are shown where they differ
    start = 0 if max(len(first), len(second)) <= _LONGEST else max(same - _LONGEST // 3, 0)
    return f"{_cut(first, start)}, now {_cut(second, start)}"


def _cut(text: str, start: int) -> str:
    end = start + _LONGEST
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
