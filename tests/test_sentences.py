"""One sentence, in the words of Python and in those of the command line."""

from __future__ import annotations

import doctest
import pickle
from pathlib import Path
from typing import Any

import pytest

from svdconvert import InputError, sentences
from svdconvert.sentences import Sentence, asked


def options(field: str, value: Any) -> str:
    """As a command line would say it."""
    return f"--{field}" if value is ... else f"--{field} {value}"


def test_documentation() -> None:
    assert doctest.testmod(sentences).attempted > 2


@pytest.mark.parametrize(
    ("value", "python", "command"),
    [
        (3, "x=3", "--x 3"),
        (0.5, "x=0.5", "--x 0.5"),
        ("a = b 'c'", "x=\"a = b 'c'\"", "--x a = b 'c'"),
        (True, "x=True", "--x True"),
        ({"attention.dense": 4}, "x={'attention.dense': 4}", "--x {'attention.dense': 4}"),
        (..., "x", "--x"),
        (None, "x=None", "--x None"),
        (float("nan"), "x=nan", "--x nan"),
        (Path("a b"), "x='a b'", "--x a b"),
        ("\x1ey=1\x1e", "x='\\x1ey=1\\x1e'", "--x \x1ey=1\x1e"),
    ],
)
def test_fields(value: object, python: str, command: str) -> None:
    text = Sentence(f"{asked('x', value)} is wrong, {asked('y')} is not")
    assert text == f"{python} is wrong, y is not"
    assert text.told(options) == f"{command} is wrong, --y is not"
    assert text.fields == ("x", "y")
    assert Sentence(text).told(options) == text.told(options)


def test_errors() -> None:
    error = InputError(f"{asked('keep', 2.0)} must lie between 0 and 1")
    assert str(error) == "keep=2.0 must lie between 0 and 1"
    assert error.fields == ("keep",)
    assert error.told(options) == "--keep 2.0 must lie between 0 and 1"
    assert str(InputError("a plain text")) == "a plain text"


def test_a_sentence_in_another() -> None:
    inner = InputError(f"{asked('keep', 2.0)} is wrong")
    outer = InputError(f"no model: {inner.sentence.marked}")
    assert str(outer) == "no model: keep=2.0 is wrong"
    assert outer.told(options) == "no model: --keep 2.0 is wrong"


def test_names_of_files_may_hold_anything() -> None:
    text = "a file \x1ekeep=\x1e is none"
    assert Sentence(text) == text
    assert Sentence(text).told(options) == text


def test_errors_travel_between_processes() -> None:
    error = InputError(f"{asked('keep', 2.0)} is wrong")
    found = pickle.loads(pickle.dumps(error))
    assert str(found) == str(error)
    assert found.told(options) == error.told(options)
