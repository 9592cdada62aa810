"""The rooms of the package: each uses only rooms below it, and no module needs itself."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.rooms import GROUND, PACKAGE, ROOF, ROOMS


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """``storage.disk``; that of a room's ``__init__`` is the room's, and empty for the package's own."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(text: str, modules: frozenset[str]) -> Iterator[str]:
    """Modules of the package that a file imports: at its top, in functions, and for types alone."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            package, _, rest = name.partition(".")
            if package == "svdconvert":
                yield rest if rest in modules else rest.rpartition(".")[0]


def first_imports(text: str, modules: frozenset[str]) -> set[str]:
    """Those that a file imports as soon as it is imported."""
    lines = [ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return set(imports("\n".join(lines), modules))


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Module -> the modules that it imports."""
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    return {name: set(imports(path.read_text(), frozenset(files))) - {name} for name, path in files.items()}


def height(module: str) -> int:
    """Floor of a module."""
    if module in ROOF:
        return len(ROOMS)
    return -1 if module in GROUND else ROOMS.index(module.partition(".")[0])


def upward(found: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Imports of something above."""
    return sorted(
        (module, other)
        for module, others in found.items()
        for other in others
        if module not in ROOF and height(other) > height(module)
    )


def test_every_module_is_in_a_room() -> None:
    found = graph()
    assert len(found) > 120
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ROOMS)
    assert {module for module in found if "." not in module} == {*ROOMS, *GROUND, *ROOF}
    assert sum(map(len, found.values())) > 500, "imports are found"


def test_no_import_goes_up() -> None:
    assert upward(graph()) == []


def test_no_circle() -> None:
    # Raises CycleError, with the circle in it.
    assert len(list(TopologicalSorter(graph()).static_order())) == len(graph())


def test_what_would_be_found(tmp_path: Path) -> None:
    """An import of another room's above, inside a function, or under TYPE_CHECKING, and a circle in one room."""
    for name, text in {
        "__init__": "",
        "errors": "",
        "linalg/__init__": "",
        "linalg/one": "def f():\n    from svdconvert.linalg import two\n",
        "linalg/two": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from svdconvert.linalg.one import f\n",
        "jobs/__init__": "",
        "jobs/job": "def f():\n    import svdconvert.commands.verify\n    from svdconvert.errors import InputError\n",
        "commands/__init__": "",
        "commands/verify": "from svdconvert.jobs.job import f\n",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = graph(tmp_path)
    assert found["linalg.one"] == {"linalg.two"}
    assert found["jobs.job"] == {"commands.verify", "errors"}
    assert upward(found) == [("jobs.job", "commands.verify")]
    with pytest.raises(CycleError):
        TopologicalSorter({name: found[name] for name in found if name.startswith("linalg")}).prepare()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_what_they_may_use(room: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    below = re.search(r"^May use: ((?:.|\n)+)\.$", text, re.MULTILINE)
    assert below is not None
    said = " ".join(below[1].split())
    assert said == (", ".join(ROOMS[: ROOMS.index(room)]) or "the modules beside it")


# Forks at every module, so that what several modules import is imported once.
ALONE = """
import importlib, json, os, sys
import torch, transformers
above = json.loads(sys.argv[1])
def grow(name):
    importlib.import_module(f"svdconvert.{name}".rstrip("."))
    for other in above.get(name, ()):
        child = os.fork()
        if not child:
            grow(other)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, other
grow("")
"""


def test_every_module_is_imported_alone() -> None:
    """Each in a process that has imported nothing else of the package than what it imports itself."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    at_once = {name: first_imports(path.read_text(), frozenset(files)) - {name} for name, path in files.items()}
    reached: dict[str, set[str]] = {}
    for name in TopologicalSorter(at_once).static_order():
        reached[name] = {name}.union(*(reached[other] for other in at_once[name]))
    above: dict[str, list[str]] = {}
    for name in files.keys() - ROOF:
        below = max(at_once[name] - {""}, key=lambda other: (len(reached[other]), other), default="")
        above.setdefault(below, []).append(name)
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(above)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
