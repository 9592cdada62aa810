"""Families whose queries, keys and values are one matrix, and their checkpoints in parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.families import write_family
from support.pairs import Pair
from support.split_models import SPLIT, ranks

from svdconvert import convert, densify
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS


@dataclass(frozen=True)
class Parts(Pair):
    """A pair, and the ranks of the factored one."""

    ranks: dict[str, int]


@pytest.fixture(scope="session", params=SPLIT)
def row(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def dense(row: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stock model, with grouped-query attention in the Phi-3. Read only."""
    return write_family(tmp_path_factory.mktemp(row.model_type) / "dense", row.model_type)


@pytest.fixture(scope="session")
def pairs(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """By layout: a checkpoint in parts, the keys dense in the second layer, and the same densified. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {}
    every = ranks(dense, 0.5)
    some = {module: rank for module, rank in every.items() if not module.endswith("key") or ".1." not in module}
    for layout in LAYOUTS:
        factored, product = folder / f"{layout}-factored", folder / f"{layout}-densified"
        convert(dense, factored, rank=some, layout=layout, split_fused=True, factor_all=True, device="cpu")
        densify(factored, product, device="cpu")
        made[layout] = Parts(factored=factored, densified=product, ranks=some)
    return made


@pytest.fixture(scope="session", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Parts]) -> Parts:
    return pairs[request.param]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"The {n}th story begins with {n * 7} words and ends well." for n in range(60)))
    return path
