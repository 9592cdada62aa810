"""Checkpoints of every family, made once for all the files of this folder that a process runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.families import FAMILIES, write_family

from svdconvert import convert, densify
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS


class Checkpoints:
    """Tiny models by family, dense and factored, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pairs: dict[str, dict[str, SimpleNamespace]] = {}

    def dense(self, model_type: str) -> Path:
        """The tiny stock model."""
        folder = self._folder / model_type / "dense"
        return folder if folder.exists() else write_family(folder, model_type)

    def pairs(self, model_type: str) -> dict[str, SimpleNamespace]:
        """By layout: a factored checkpoint with one kind of target left dense, and the same densified."""
        if model_type not in self._pairs:
            kinds = [name for name in ARCHITECTURES[model_type].targets if "o_proj" not in name]
            folder, made = self._folder / model_type, {}
            for layout in LAYOUTS:
                factored, product = folder / f"{layout}-factored", folder / f"{layout}-densified"
                convert(self.dense(model_type), factored, keep=0.6, layout=layout, targets=kinds, device="cpu")
                densify(factored, product, device="cpu")
                made[layout] = SimpleNamespace(factored=factored, densified=product)
            self._pairs[model_type] = made
        return self._pairs[model_type]


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


@pytest.fixture(scope="session")
def pairs(row: Architecture, checkpoints: Checkpoints) -> dict[str, SimpleNamespace]:
    """By layout: a factored checkpoint with one kind of target left dense, and the same densified. Read only."""
    return checkpoints.pairs(row.model_type)


@pytest.fixture(scope="session", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, SimpleNamespace]) -> SimpleNamespace:
    return pairs[request.param]
