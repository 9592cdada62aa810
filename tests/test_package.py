"""What is installed: a wheel with everything in it, and a package that is light until it is used."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import util
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
    assert "svdconvert/reports/style.css" in names
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
    assert "svdconvert = svdconvert.program:run" in archive.read(name).decode()


def test_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked somewhere else it finds its own files, the modeling file for new checkpoints among them."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import svdconvert; from svdconvert.families.table import GPT_NEOX; "
        "from svdconvert.jobs.model_files import modeling_source; "
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files as they are cloned, without anything that an installation leaves in them."""
    root = tmp_path_factory.mktemp("clone") / "repository"
    for name in ("svdconvert", "modeling"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as `pip install .` leaves it: a folder of files, away from the repository."""
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.mark.parametrize("start", [["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m"]])
def test_from_the_repository_after_an_installation(
    start: list[str], checkout: Path, installed: Path, dense: Path, tmp_path: Path
) -> None:
    """In the repository's root its folder `svdconvert` comes before the installed package, and has to be whole."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, *start, "svdconvert", str(dense), "--rank", "8", "--device", "cpu", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
        # Before an editable installation, which would lead to this repository; behind the folder we are in.
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "logits" in done.stdout
    assert (out / "modeling_polyglot_svd.py").read_bytes() == (ROOT / "modeling/modeling_polyglot_svd.py").read_bytes()


@pytest.mark.parametrize("installation", [True, False])
def test_where_the_modeling_files_are(installation: bool, checkout: Path, installed: Path, tmp_path: Path) -> None:
    """An installation uses its own package, a checkout the folder beside it; neither needs the other."""
    place = installed if installation else checkout
    program = (
        "import svdconvert.modeling as m; from importlib.util import find_spec; "
        "from svdconvert.version import versions; "
        "print(m.__file__); print(find_spec('svdconvert.modeling.modeling_llama_svd').origin); "
        "print(versions()['svdconvert'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
    )
    assert done.returncode == 0, done.stderr
    package, file, version = done.stdout.splitlines()
    assert Path(package) == place / ("svdconvert/modeling/__init__.py" if installation else "svdconvert/modeling.py")
    assert Path(file) == place / ("svdconvert/modeling" if installation else "modeling") / "modeling_llama_svd.py"
    assert version == svdconvert.__version__


@pytest.mark.parametrize("name", svdconvert.__all__)
def test_public_names(name: str) -> None:
    value = getattr(svdconvert, name)
    assert inspect.isclass(value) or inspect.isfunction(value), name
    assert value.__module__.startswith("svdconvert.")
    assert len(inspect.getdoc(value) or "") > 20, f"{name} is not documented"
    if inspect.isfunction(value):
        for parameter in inspect.signature(value).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, (name, parameter.name)


FUNCTIONS = [name for name in svdconvert.__all__ if inspect.isfunction(getattr(svdconvert, name))]


def explained(function: object) -> set[str]:
    """Names that the Args section of a docstring explains: `name: what it is`, or `name, name, name: ...`."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    entries = re.split(r"\n(?=    \S)", "\n" + section[1]) if section else []
    found: set[str] = set()
    for entry in entries:
        names, colon, meaning = " ".join(entry.split()).partition(": ")
        if colon and len(meaning) > 3:
            found |= set(names.split(", "))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_of_a_public_function_is_explained(name: str) -> None:
    assert len(FUNCTIONS) >= 11
    function = getattr(svdconvert, name)
    assert explained(function) == set(inspect.signature(function).parameters)


def test_what_counts_as_explained() -> None:
    def good(one: int, two: int, three: int) -> None:
        """Do it.

        Args:
            one: the first, where three: is no entry.
            two, three: others,
                with a line more.

        Raises:
            ValueError: never.
        """

    assert explained(good) == {"one", "two", "three"}
    good.__doc__ = "Uses one: and two: in passing.\n\nArgs:\n    one: number.\n\nReturns:\n    two: nothing.\n"
    assert explained(good) == {"one"}


def test_all_is_complete() -> None:
    assert sorted(svdconvert.__all__) == svdconvert.__all__
    assert set(dir(svdconvert)) >= set(svdconvert.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", svdconvert.__version__)
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
    "svdconvert.cli.app",
    "svdconvert.planning.plan",
    "svdconvert.planning.make",
    "svdconvert.settings.conversion",
    "svdconvert.commands.plan",
    "svdconvert.planning.ranks",
    "svdconvert.commands.convert",
    "svdconvert.storage.source",
    "svdconvert.storage.hub_source",
    "svdconvert.jobs.job",
    "svdconvert.cli.report",
    "svdconvert.commands.sweep_book",
    "svdconvert.commands.html_report",
    "svdconvert.planning.targets",
    "svdconvert.jobs.output",
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
    assert heavy["svdconvert.cli.app"] == []


def test_typed() -> None:
    assert (Path(svdconvert.__file__).parent / "py.typed").is_file()
