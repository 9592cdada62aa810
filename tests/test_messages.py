"""Messages of the library: they name keywords, which exist, and never an option of the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import svdconvert
from svdconvert import Calibration
from svdconvert.cli.app import main
from svdconvert.settings.options import option_name

PACKAGE = Path(svdconvert.__file__).parent
OPTIONS = {name for command in main.commands.values() for option in command.params for name in option.opts} | {
    name for option in main.params for name in option.opts
}
# The fields of a request with their options, from which the command line is built and commands are written.
TABLES = {
    f"settings/{name}.py"
    for name in "afterwards conversion healing hub options output recipe row runtime scope size text".split()
}
# What a message tells a user to run.
COMMAND = re.compile(r"`[^`]*`|^(svdconvert|fold|hf) .*$", re.DOTALL)


def library() -> Iterator[tuple[str, ast.Module]]:
    """The library's files, without the command line's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith("cli/"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Strings of a file that are no docstrings, with their lines; of an f-string the whole, its values as ``{}``."""
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(node.value)
        if isinstance(node, ast.JoinedStr):
            left_out.update(node.values)
            yield node.lineno, "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node.lineno, node.value


def named_options(tree: ast.Module) -> list[tuple[int, str]]:
    """Options of the program in a file's strings, with their lines."""
    return [
        (line, name)
        for line, text in texts(tree)
        for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", COMMAND.sub("", text))
        if name in OPTIONS
    ]


def asked_fields(tree: ast.Module) -> list[str]:
    """Fields of a request that a file's sentences name."""
    return [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "asked"
        if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    ]


def keywords() -> set[str]:
    """Parameters of the public functions, and fields of a calibration."""
    found = {f"calibration.{field.name}" for field in fields(Calibration)}
    for tree in FILES.values():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in svdconvert.__all__:
                found.update(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return found


FILES = dict(library())
KEYWORDS = keywords()
FIELDS = sorted({field for tree in FILES.values() for field in asked_fields(tree)})


def test_what_would_be_found() -> None:
    tree = ast.parse(
        '"""A docstring may name --keep."""\n'
        "A = f\"{B} is the size; give {asked('keep')} or --params\"\n"
        'C = "run `svdconvert densify X --out DIR`, or --nothing, or a--keep"\n'
        'D = "svdconvert evaluate X --text FILE"\n'
        'E = {"--seed": 0}\n'
    )
    assert named_options(tree) == [(2, "--params"), (5, "--seed")]
    assert asked_fields(tree) == ["keep"]


def test_strings_are_found() -> None:
    assert len(FILES) > 100
    assert {"--keep", "--out", "--calib", "--window", "--work"} <= OPTIONS
    assert sum(len(list(texts(tree))) for tree in FILES.values()) > 2000
    assert {"keep", "window", "out", "calibration.samples"} <= set(FIELDS)


@pytest.mark.parametrize("name", sorted(FILES.keys() - TABLES))
def test_no_option_of_the_command_line(name: str) -> None:
    assert named_options(FILES[name]) == []


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_a_keyword_and_an_option(field: str) -> None:
    assert field in KEYWORDS
    assert option_name(field) in OPTIONS
