"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import svdconvert

SCRIPT = Path(__file__).parents[2] / "docs" / "make_api.py"


def script() -> ModuleType:
    found = importlib.util.spec_from_file_location("make_api", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_it_is_current() -> None:
    made = script()
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run `python docs/make_api.py`"


def test_everything_exported_has_an_entry() -> None:
    page = script().page()
    assert sorted(re.findall(r"^### (\w+)$", page, re.MULTILINE)) == sorted(svdconvert.__all__)


def test_sections_become_lists() -> None:
    text = script().prose(
        "What it does, see :func:`plan`.\n\n"
        "Args:\n    one, two: numbers of ``type``\n        int.\n    three: more.\n\n"
        "Returns:\n    The sum.\n\nRaises:\n    InputError: never."
    )
    assert text.split("\n") == [
        "What it does, see [`plan`](#plan).", "",
        "Arguments:", "", "* `one`, `two`: numbers of `type` int.", "* `three`: more.", "",
        "Returns:", "", "The sum.", "",
        "Raises:", "", "* `InputError`: never.", "",
    ]  # fmt: skip
