"""Checkpoints of every family, made once for all the files of this folder that a process runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.families import FAMILIES, write_family
from support.pairs import Pair

from svdconvert import convert, densify
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS


class Checkpoints:
    """Tiny models by family, dense and factored, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: dict[tuple[str, str], Pair] = {}

    def dense(self, model_type: str) -> Path:
        """The tiny stock model."""
        folder = self._folder / model_type / "dense"
        return folder if folder.exists() else write_family(folder, model_type)

    def pair(self, model_type: str, layout: str = "balanced") -> Pair:
        """A factored checkpoint with one kind of target left dense, and the same densified."""
        if (model_type, layout) not in self._pairs:
            kinds = [name for name in ARCHITECTURES[model_type].targets if "o_proj" not in name]
            folder = self._folder / model_type
            pair = Pair(factored=folder / f"{layout}-factored", densified=folder / f"{layout}-densified")
            options = {"targets": kinds, "device": "cpu", "check": False}
            convert(self.dense(model_type), pair.factored, keep=0.6, layout=layout, **options)
            densify(pair.factored, pair.densified, device="cpu", check=False)
            self._pairs[model_type, layout] = pair
        return self._pairs[model_type, layout]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("families"))


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
