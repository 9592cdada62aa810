"""Functions of at most 80 lines and files of at most 500."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import svdconvert

PACKAGE = Path(svdconvert.__file__).parent
DIALOGUE = Path(__file__).parents[1] / "examples" / "dialogue"
# Modeling files are rendered, one for each family, with all that a checkpoint needs in it.
FILES = sorted(
    path for folder in (PACKAGE, DIALOGUE) for path in folder.rglob("*.py") if path.parent.name != "modeling"
)

LONGEST_FUNCTION = 80
LONGEST_FILE = 500

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(text: str) -> Iterator[Function]:
    """All functions of a file, methods and inner ones included."""
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines from ``def`` to the end, without the docstring and without decorators."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


def test_what_would_be_found() -> None:
    text = 'def a():\n    """One.\n\n    Two.\n    """\n\n    def b():\n        return 1\n\n    return b\n'
    assert {function.name: length(function) for function in functions(text)} == {"a": 6, "b": 2}
    assert sum(1 for path in FILES for _ in functions(path.read_text(encoding="utf-8"))) > 1000


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_no_function_and_no_file_is_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert [function.name for function in functions(text) if length(function) > LONGEST_FUNCTION] == []
