"""Sentences of the library in the words of the command line: ``share_layers=3`` is ``--share-layers 3`` here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from svdconvert.sentences import Sentence
from svdconvert.settings.options import option_name
from svdconvert.words import size_text


def told(text: str) -> str:
    """A message of the library, with options in the place of keywords."""
    return text.told(in_options) if isinstance(text, Sentence) else text


def in_options(field: str, value: Any) -> str:
    """A field of a request as an option of the command line, quoted for a shell where needed.

    Args:
        field: as :func:`svdconvert.sentences.asked` has it.
        value: the requested value; ``...`` for the option alone.
    """
    name = option_name(field)
    if value is ...:
        return name
    if value is None:
        return f"no {name}"
    if isinstance(value, bool):
        # `--no-check` is there for check=False.
        return name if value is not name.startswith("--no-") else f"no {name}"
    if field in ("bytes", "fit") and isinstance(value, int):
        value = size_text(value)
    return " ".join(f"{name} {shlex.quote(word)}" for word in _words(value))


def _words(value: Any) -> list[str]:
    """The value of each occurrence of an option."""
    if isinstance(value, Mapping):
        return [_text(rank) if pattern == "*" else f"{pattern}={_text(rank)}" for pattern, rank in value.items()]
    if not isinstance(value, list | tuple):
        return [_text(value)]
    texts = [_text(one) for one in value]
    # Budgets of a sweep are given as one list; other options are repeated.
    return texts if any(isinstance(one, str) for one in value) else [",".join(texts)]


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
