"""Results whose pages are looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdconvert import Calibration, convert


@pytest.fixture(scope="session")
def results(dense: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of several kinds, each with its page; ``plain`` was made without one. Read only."""
    folder = tmp_path_factory.mktemp("results")
    ways: dict[str, dict[str, object]] = {
        "plain": {"rank": 16, "report": False},
        "calibrated": {"keep": 0.6, "layout": "pivoted", "calibration": calibration},
        "shared": {"rank": 16, "share_layers": 2, "split_fused": True},
        "some dense": {"rank": {"mlp.*": 20, "layers.1.attention.dense": 63, "layers.0.*": 12}},
    }
    for name, settings in ways.items():
        convert(dense, folder / name, **{"device": "cpu", "report": True, "check": name == "calibrated", **settings})  # type: ignore[arg-type]
    return {name: folder / name for name in ways}
