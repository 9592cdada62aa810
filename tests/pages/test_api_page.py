"""docs/api.md is what the docstrings say, docs/options.md what the fields of a request say."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest
from support.pages import ROOT

import svdconvert
from svdconvert.cli.app import main


def script(name: str = "make_api") -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["make_api", "make_options"])
def test_it_is_current(name: str) -> None:
    made = script(name)
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run `make pages`"


def test_every_option_of_the_command_has_a_row() -> None:
    shown = set(re.findall(r"^\| `(--[\w-]+)", script("make_options").page(), re.MULTILINE))
    options = {
        command: {name for parameter in main.commands[command].params for name in parameter.opts if name[:2] == "--"}
        for command in ("convert", "heal")
    }
    assert options["convert"] - shown == {"--dry-run", "--json", "--out", "--quiet", "--verbose"}
    assert options["heal"] - shown == {"--against", "--against-revision", "--out", "--quiet", "--verbose"}
    assert shown <= options["convert"] | options["heal"]


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
