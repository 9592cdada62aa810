"""What is installed: a wheel with everything in it, and a package that is light until it is used."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, util
from pathlib import Path

import pytest

import svdconvert

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders beside what it builds from."""
    if util.find_spec("setuptools") is None or util.find_spec("pip") is None:
        pytest.skip("needs pip and setuptools in the environment, since nothing is downloaded here")
    folder = tmp_path_factory.mktemp("build")
    source, target = folder / "source", folder / "wheels"
    for name in ("svdconvert", "modeling"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-w", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


def test_wheel_has_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"svdconvert/py.typed", "svdconvert/modeling/modeling_polyglot_svd.py", "svdconvert/__main__.py"} <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "svdconvert").rglob("*.py")}
    modules |= {f"svdconvert/modeling/{path.name}" for path in (ROOT / "modeling").glob("modeling_*.py")}
    assert modules <= names
    assert any(re.fullmatch(r"svdconvert-[\d.]+\.dist-info/(licenses/)?LICENSE", name) for name in names)
    surplus = {name for name in names if not name.startswith(("svdconvert/", "svdconvert-"))}
    assert not surplus, "nothing else is put into site-packages"
    assert not any(name.startswith("svdconvert/tests") or name.endswith(".pyc") for name in names)


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(name).decode()
    for package in ("torch", "transformers", "safetensors", "huggingface-hub", "click", "rich", "numpy", "accelerate"):
        assert re.search(rf"^Requires-Dist: {package}\W", text, re.MULTILINE), package
    assert re.search(r"^Requires-Python: >=3\.10$", text, re.MULTILINE)
    assert re.search(r"^License-Expression: Apache-2\.0$", text, re.MULTILINE)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "svdconvert = svdconvert.cli:main" in archive.read(name).decode()


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked somewhere else it finds its own files, the modeling file for new checkpoints among them."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import svdconvert; from svdconvert.architectures import GPT_NEOX; "
        "from svdconvert.checkpoint import modeling_source; "
        "print(svdconvert.__file__); print(len(modeling_source(GPT_NEOX)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        # Before the installed package, wherever that is.
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    file, size = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert int(size) == (ROOT / "modeling" / "modeling_polyglot_svd.py").stat().st_size


@pytest.mark.parametrize("name", svdconvert.__all__)
def test_public_names(name: str) -> None:
    value = getattr(svdconvert, name)
    assert inspect.isclass(value) or inspect.isfunction(value), name
    assert value.__module__.startswith("svdconvert.")
    assert len(inspect.getdoc(value) or "") > 20, f"{name} is not documented"
    if inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter.name)


@pytest.mark.parametrize("name", ["convert", "plan", "densify", "evaluate", "fold", "verify", "push"])
def test_every_parameter_of_a_public_function_is_explained(name: str) -> None:
    function = getattr(svdconvert, name)
    text = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b.*:", text), (name, parameter)


def test_all_is_complete() -> None:
    assert sorted(svdconvert.__all__) == svdconvert.__all__
    assert set(dir(svdconvert)) >= set(svdconvert.__all__)
    assert svdconvert.__version__ == metadata.version("svdconvert")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = svdconvert.nonsense


def test_names_stay_functions_whatever_is_imported() -> None:
    """A submodule of the same name would take the function's place as soon as it is imported."""
    submodules = {module.name for module in pkgutil.iter_modules(svdconvert.__path__)}
    assert not submodules & set(svdconvert.__all__)
    for name in submodules - {"__main__"}:
        importlib.import_module(f"svdconvert.{name}")
    from svdconvert import convert, densify, evaluate, fold, plan, push, verify

    for value in (convert, densify, evaluate, fold, plan, push, verify):
        assert inspect.isfunction(value)


LIGHT = [
    "svdconvert",
    "svdconvert.cli",
    "svdconvert.planning",
    "svdconvert.ranks",
    "svdconvert.conversion",
    "svdconvert.source",
    "svdconvert.hub",
    "svdconvert.job",
    "svdconvert.report",
    "svdconvert.writer",
]


def test_light_modules_do_not_import_torch() -> None:
    program = (
        "import importlib, json, sys\n"
        "heavy = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    importlib.import_module(name)\n"
        "    heavy[name] = sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules))\n"
        "print(json.dumps(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(LIGHT)], capture_output=True, text=True, check=True
    )
    heavy = json.loads(done.stdout)
    # numpy is no burden beside these, but the command line itself does without.
    assert {name: [m for m in found if m != "numpy"] for name, found in heavy.items()} == {name: [] for name in LIGHT}
    assert heavy["svdconvert.cli"] == []


def test_typed() -> None:
    assert (Path(svdconvert.__file__).parent / "py.typed").is_file()
