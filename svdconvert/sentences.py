"""Sentences that name what a user has asked for, in the words of whoever shows them.

The library is called from Python and from the command line. What a caller of :func:`svdconvert.convert` wrote as
``share_layers=3`` is ``--share-layers 3`` to the other one, so a sentence keeps the field, and each side says it in its
own way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

# The field and its value between two separators that no text has.
_ASKED = re.compile("\x1e([\\w.]+)=([^\x1e]*)\x1e")
_ALONE = "..."


def asked(field: str, value: object = ...) -> str:
    """A field of a request, for use in a sentence.

    Args:
        field: as :func:`svdconvert.convert` calls it; of a calibration's, ``calibration.samples``.
        value: what was asked for, in JSON types (anything else, a path say, as its text); without it the field alone
            is named.
    """
    return f"\x1e{field}={_ALONE if value is ... else json.dumps(value, default=str)}\x1e"


def printable(text: str, most: int | None = 2000) -> str:
    """A text from outside for people: what does not print is spelled out, and what is too long is cut.

    Names in files and of files may hold anything, and must not control a terminal.

    >>> printable("layers.0\\x1b[2J")
    'layers.0\\\\x1b[2J'

    Args:
        text: of one line.
        most: its longest length; None cuts nothing.
    """
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_python(field: str, value: object) -> str:
    """How a caller of the library writes it: ``share_layers=3``; ``share_layers`` alone without a value (``...``)."""
    return field if value is ... else f"{field}={value!r}"


class Sentence(str):
    """A text in the words of the library; :meth:`told` has it in other words.

    >>> text = Sentence(f"{asked('share_layers', 3)} does not go with {asked('layout', 'pivoted')}")
    >>> str(text)
    "share_layers=3 does not go with layout='pivoted'"
    >>> text.told(lambda field, value: f"--{field.replace('_', '-')} {value}")
    '--share-layers 3 does not go with --layout pivoted'

    Attributes:
        marked: the text as :func:`asked` writes fields, for use in another sentence.
        fields: those that it names, in order.
    """

    marked: str
    fields: tuple[str, ...]

    def __new__(cls, text: str) -> Sentence:
        """A sentence with fields in it, as :func:`asked` writes them."""
        marked = text.marked if isinstance(text, Sentence) else text
        self = super().__new__(cls, _told(marked, in_python))
        self.marked = marked
        self.fields = tuple(found[1] for found in _ASKED.finditer(marked))
        return self

    def told(self, words: Callable[[str, Any], str]) -> str:
        """The sentence with each field as ``words(field, value)``; the value is ``...`` where the field is alone."""
        return _told(self.marked, words)


def _told(marked: str, words: Callable[[str, Any], str]) -> str:
    def say(found: re.Match[str]) -> str:
        try:
            value = ... if found[2] == _ALONE else json.loads(found[2])
        except ValueError:  # separators of somebody else's, in the name of a file say
            return found[0]
        return words(found[1], value)

    return _ASKED.sub(say, marked)
