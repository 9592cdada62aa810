"""What became of a matrix, as an object and as JSON of any version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from svdconvert import convert
from svdconvert.factoring.matrix_report import GroupReport, MatrixReport, PlainReport, matrix_reports

WHOLE = MatrixReport(
    rank=4,
    shape=(8, 6),
    relative_error=0.6,
    optimal_error=0.5,
    precision="float64",
    basis="paired",
    certificate=1e-4,
    solver="filtered",
    lost=1.0,
    whole=4.0,
    refit={"damping": None, "held_out_error": [0.2, 0.2]},
    seconds=0.25,
)


def test_json_and_back() -> None:
    told = json.loads(json.dumps(WHOLE.to_json()))
    assert MatrixReport.from_json(told) == WHOLE
    assert told["energy_kept"] == pytest.approx(0.64)
    assert told["shape"] == [8, 6]
    assert told["rounding_excess"] is None  # known to be unknown, as versions before wrote it
    assert "output_error" not in told


def test_other_versions() -> None:
    told = {"rank": 4, "shape": [8, 6], "relative_error": 0.6, "something_new": 1}
    assert MatrixReport.from_json(told) == MatrixReport(rank=4, shape=(8, 6), relative_error=0.6)


def test_layers_that_share() -> None:
    layers = tuple(MatrixReport(rank=4, shape=(8, 6), relative_error=e, precision="float32") for e in (0.1, 0.2))
    told: dict[str, Any] = json.loads(json.dumps(GroupReport(relative_error=0.15, layers=layers).to_json()))
    assert told["rank"] == 4
    assert all("rank" not in layer for layer in told["layers"])
    found = matrix_reports({**told, "seconds": 1.0}, ["a", "b"])
    assert found["a"].shared_with is None
    assert found["b"].shared_with == "a"
    assert [report.relative_error for report in found.values()] == [0.1, 0.2]
    assert [report.seconds for report in found.values()] == [0.5, 0.5]


def test_steps_that_truncate_nothing() -> None:
    assert PlainReport().to_json() == {}
    assert PlainReport(rank=3).to_json() == {"rank": 3}


@pytest.mark.parametrize("how", [{}, {"layout": "pivoted"}, {"share_layers": 2}], ids=["balanced", "pivoted", "shared"])
def test_a_record_holds_such_reports(how: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    report = convert(dense, tmp_path / "out", rank=16, device="cpu", **how)
    for told in report.matrices.values():
        found = MatrixReport.from_json(told)
        assert found.to_json() == told
        assert found.rank == 16
        assert found.precision == "float32"
        assert 0 < (found.optimal_error or 0) <= found.relative_error * (1 + 1e-6)
