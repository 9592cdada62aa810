"""Everything that computes, on a device that is not the CPU (``support/accelerator.py``), against the CPU."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.accelerator import accelerator, named, slow_float64  # noqa: F401 - one is a fixture
from support.methods import DATA_AWARE
from support.results import products

from svdconvert import Calibration, calibrate, convert, densify
from svdconvert.errors import InputError


@pytest.fixture
def device(accelerator: torch.device) -> Iterator[str]:  # noqa: F811
    """Its name, which the tool takes."""
    with named("commands.convert", "commands.rewriting", "commands.calibrate", "commands.spectrum"):
        yield str(accelerator)


def far(one: Path, other: Path) -> float:
    """Largest relative distance of the products of two factored checkpoints."""
    first, second = products(one), products(other)
    assert first.keys() == second.keys()
    return max(
        float(torch.linalg.norm(a.double() - second[name].double()) / torch.linalg.norm(a.double()))
        for name, a in first.items()
    )


def assert_same_errors(one: Path, other: Path, tolerance: float) -> None:
    """Whether the records of two checkpoints tell the same of every matrix."""
    first, second = (json.loads((folder / "svdconvert.json").read_text()) for folder in (one, other))
    assert first["matrices"].keys() == second["matrices"].keys()
    for module, matrix in first["matrices"].items():
        for key in ("rank", "relative_error", "optimal_error", "output_error", "lost"):
            if key in matrix:
                assert second["matrices"][module][key] == pytest.approx(matrix[key], rel=tolerance, abs=1e-4), key
    for key in ("measured_loss", "predicted_loss"):
        if key in first:
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=3e-5), key


PLAIN: Mapping[str, dict[str, Any]] = {
    "balanced": {},
    "pivoted": {"layout": "pivoted"},
    "shared": {"share_layers": 3},
    "split": {"split_fused": True},
    "kept decompositions": {"keep_work": True},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_plain(options: dict[str, Any], dense: Path, device: str, tmp_path: Path) -> None:
    for name in ("cpu", device):
        convert(dense, tmp_path / name, rank=20, device=name, check=False, **options)
    assert far(tmp_path / "cpu", tmp_path / device) < 1e-2
    assert_same_errors(tmp_path / "cpu", tmp_path / device, 1e-4)


CALIBRATED: Mapping[str, dict[str, Any]] = {
    **{method: {"method": method} for method in DATA_AWARE},
    "kfac, pivoted, refitted": {"method": "kfac", "layout": "pivoted", "refit": "sequential"},
    "whiten, shared": {"method": "whiten", "share_layers": 3},
    "kfac, shared": {"method": "kfac", "share_layers": 3},
    "kfac, split, checked": {"method": "kfac", "split_fused": True, "check": True},
}


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """A text whose metrics are not singular: where they are, products may differ as they like."""
    choice, path = random.Random(0), tmp_path_factory.mktemp("varied") / "text.txt"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789가나다라마바사아자차카타파하"
    words = ["".join(choice.choices(letters, k=choice.randint(1, 8))) for _ in range(2000)]
    path.write_text("\n\n".join(" ".join(choice.choices(words, k=20)) for _ in range(200)), encoding="utf-8")
    return Calibration(str(path), samples=48, length=48, batch_size=20)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="asks torch.autocast about the device's name")
@pytest.mark.parametrize("options", CALIBRATED.values(), ids=CALIBRATED)
def test_calibrated(options: dict[str, Any], dense: Path, varied: Calibration, device: str, tmp_path: Path) -> None:
    options = {"keep": 0.5, "calibration": varied, "check": False, **options}
    for name in ("cpu", device):
        convert(dense, tmp_path / name, device=name, **options)
    assert far(tmp_path / "cpu", tmp_path / device) < 2e-2
    assert_same_errors(tmp_path / "cpu", tmp_path / device, 1e-3)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="asks torch.autocast about the device's name")
def test_calibrated_where_float64_is_slow(dense: Path, varied: Calibration, device: str, tmp_path: Path) -> None:
    """The other road is taken, told in the record, and gives the same."""
    options = {"keep": 0.5, "method": "kfac", "layout": "pivoted", "calibration": varied}
    convert(dense, tmp_path / "cpu", device="cpu", **options)
    with slow_float64():
        record = convert(dense, tmp_path / device, device=device, **options).outcome.record
    assert far(tmp_path / "cpu", tmp_path / device) < 2e-2
    assert_same_errors(tmp_path / "cpu", tmp_path / device, 1e-3)
    assert record["arithmetic"].endswith("as float64 is slow here")
    assert {matrix["precision"] for matrix in record["matrices"].values()} == {"float32"}


def test_decompositions_of_both_kinds_are_not_mixed(dense: Path, device: str, tmp_path: Path) -> None:
    """A GPU with slow float64 computes others, and has the name of the one without."""
    options = {"rank": 20, "device": device, "work": tmp_path / "work", "check": False}
    convert(dense, tmp_path / "first", **options)
    with slow_float64(), pytest.raises(InputError, match=r'another device .*"lazy", now "lazy with slow float64"'):
        convert(dense, tmp_path / "second", **options)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="asks torch.autocast about the device's name")
def test_statistics(dense: Path, varied: Calibration, device: str, tmp_path: Path) -> None:
    for name in ("cpu", device):
        calibrate(dense, varied, tmp_path / f"{name}-statistics", device=name)
        stats = tmp_path / f"{name}-statistics"
        convert(dense, tmp_path / name, keep=0.5, device=name, method="kfac", stats=stats, check=False)
    assert far(tmp_path / "cpu", tmp_path / device) < 2e-2


def test_densify(factored: Path, device: str, tmp_path: Path) -> None:
    for name in ("cpu", device):
        densify(factored, tmp_path / name, device=name, check=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", device))
    assert all(torch.allclose(tensor.float(), other[name].float(), atol=1e-3) for name, tensor in one.items())


@pytest.mark.parametrize("settings", [{"layout": "pivoted"}, {"share_layers": 3}], ids=["pivoted", "shared"])
def test_measured_budgets(
    settings: dict[str, Any], device: str, dense: Path, calibration: Calibration, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Gradients of weights and the measured divergence are those of the CPU."""
    monkeypatch.setattr("svdconvert.commands.measured_budgets.ROUNDS", 1)
    common = {"keep": 0.3, "allocation": "measured", "calibration": calibration, "check": False, **settings}
    found, wanted = (
        convert(dense, tmp_path / name, device=name, **common).outcome.record["budget"] for name in (device, "cpu")
    )
    assert found["dense_loss"] == pytest.approx(wanted["dense_loss"], rel=1e-4)
    assert len(found["rounds"]) == 2
    for one, other in zip(found["rounds"], wanted["rounds"], strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=0.02)
