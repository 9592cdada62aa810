"""Fixtures for the whole suite. Nothing here reaches the network, and nothing outside tmp folders is written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

# Matrices this small are faster on one thread, far more so on a busy machine. And the last bits of a sum depend on the
# number of threads, whatever the shell asks for.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Every test process copies checkpoints' modeling files to a place of its own: several of them write the same names, and
# none should fill the user's cache. Read when transformers is imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")

import pytest
from hypothesis import HealthCheck, settings

# On a busy machine any example may take long.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Where its asserts are those of tests, too.
pytest.register_assert_rewrite("support")

# A third of the time of loading a tiny model.
import_module("support.compiled_once").compile_once(os.environ["HF_MODULES_CACHE"])

# Waiting for the disk, thousands of times, would take longer than what is tested.
os.fsync = import_module("support.durable").sync_nothing

if TYPE_CHECKING:
    from support.forked import Forked

    from svdconvert import Calibration

MODULES = os.environ["HF_MODULES_CACHE"]
OWNER = os.getpid()


def pytest_collection_finish() -> None:
    """All test modules are imported, and with them what they use."""
    from support.settled import settle

    settle()


@atexit.register
def _remove_modules() -> None:
    if os.getpid() == OWNER:
        shutil.rmtree(MODULES, ignore_errors=True)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-NeoX: one float16 safetensors file, no legacy buffers. Read only."""
    from support.checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="session")
def factored(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` at rank 16. Read only."""
    from svdconvert import convert

    folder = tmp_path_factory.mktemp("factored") / "tiny-r16"
    convert(dense, folder, rank=16, device="cpu")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["호랑이", "tiger", "옛날", "mountain", "살았다", "0123"]
    lines = [" ".join(words[(7 * i + 3 * j * j) % 6] for j in range(12)) for i in range(60)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def calibration(text: Path) -> Calibration:
    """24 sequences of 48 tokens of it."""
    from svdconvert import Calibration

    return Calibration(str(text), samples=24, length=48, batch_size=5)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Starts commands in several processes, by ``support.launching.together``."""
    from support.launching import launcher

    started = launcher(tmp_path_factory.mktemp("launcher"))
    yield started
    started.close()


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint into this test's folder; arguments as of ``write_checkpoint``."""
    from support.checkpoints import write_checkpoint

    return lambda *args, **kwargs: write_checkpoint(tmp_path / "model", *args, **kwargs)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs a command line as the program does; gives exit code, standard output and standard error."""

    from svdconvert.cli.app import main

    def call(*args: object) -> SimpleNamespace:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=out, err=err)

    return call
