"""Checkpoints of every family, made once for all the files of this folder and all processes that run them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from support.families import FAMILIES, write_family
from support.pairs import Pair

from svdconvert import convert, densify
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that the first process to ask for it makes; the others wait, and find it whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


class Checkpoints:
    """Tiny models by family, dense and factored, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: dict[tuple[str, str], Pair] = {}

    def dense(self, model_type: str) -> Path:
        """The tiny stock model."""
        return made_once(self._folder / model_type / "dense", lambda folder: write_family(folder, model_type))

    def pair(self, model_type: str, layout: str = "balanced") -> Pair:
        """A factored checkpoint with one kind of target left dense, and the same densified."""
        if (model_type, layout) not in self._pairs:
            kinds = [name for name in ARCHITECTURES[model_type].targets if "o_proj" not in name]
            folder = self._folder / model_type
            pair = Pair(factored=folder / f"{layout}-factored", densified=folder / f"{layout}-densified")
            dense = self.dense(model_type)

            def convert_it(out: Path) -> None:
                convert(dense, out, keep=0.6, layout=layout, targets=kinds, device="cpu", check=False)

            made_once(pair.factored, convert_it)
            made_once(pair.densified, lambda out: densify(pair.factored, out, device="cpu", check=False))
            self._pairs[model_type, layout] = pair
        return self._pairs[model_type, layout]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    own = tmp_path_factory.getbasetemp()
    return Checkpoints((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "families")


@pytest.fixture(scope="session", params=FAMILIES)
def row(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def dense(row: Architecture, checkpoints: Checkpoints) -> Path:
    """The tiny stock model. Read only."""
    return checkpoints.dense(row.model_type)


@pytest.fixture(scope="session", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, row: Architecture, checkpoints: Checkpoints) -> Pair:
    """A factored checkpoint with one kind of target left dense, and the same densified. Read only."""
    return checkpoints.pair(row.model_type, request.param)
