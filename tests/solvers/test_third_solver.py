"""A solver is one class and one line of the table: a third one is planned, split and run like the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import TARGETS, read_weights
from torch import Tensor

from svdconvert import convert, plan
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.results import Factors
from svdconvert.planning.partition import step_cost
from svdconvert.solvers.row import Solver
from svdconvert.solvers.table import SOLVERS


class Counting(Solver):
    """The exact one, for matrices that are not square, with a look at what it is given."""

    name = "counting"
    eigenproblem = 20
    single_plain_only = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def acts(self, shape: tuple[int, int], rank: int) -> bool:
        return shape[0] != shape[1]

    def factorize(self, weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace) -> Factors:
        self.seen.append((weight.shape[0], weight.shape[1]))
        return factorize(weight, rank, dtype, workspace)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    solver = Counting()
    monkeypatch.setitem(SOLVERS, "counting", solver)  # type: ignore[arg-type]
    return solver


def test_it_solves_where_it_acts(counting: Counting, dense: Path, tmp_path: Path) -> None:
    report = convert(dense, tmp_path / "counting", rank=16, solver="counting", device="cpu")
    shapes = [tuple(matrix["shape"]) for matrix in report.matrices.values()]
    assert sorted(counting.seen) == sorted(shape for shape in shapes if shape[0] != shape[1])
    assert 0 < len(counting.seen) < len(TARGETS)
    convert(dense, tmp_path / "exact", rank=16, device="cpu")
    ours, theirs = read_weights(tmp_path / "counting"), read_weights(tmp_path / "exact")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_it_costs(counting: Counting, dense: Path) -> None:
    costs = {
        name: {step.key: step_cost(step) for step in plan(dense, rank=16, solver=name).steps}
        for name in ("exact", "counting")
    }
    dearer = [key for key, cost in costs["counting"].items() if cost > costs["exact"][key]]
    assert {key.split(".")[-2] for key in dearer} == {"query_key_value", "dense_h_to_4h", "dense_4h_to_h"}
