"""A layout is one class and one line of the table: a third one, with its tensors of other ranks, goes all the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import TARGETS, read_config, read_weights
from torch import Tensor

from svdconvert import InputError, convert, densify, fold
from svdconvert.commands.comparing import compare_tensors
from svdconvert.families.table import factored_architecture
from svdconvert.layouts.row import Layout, Shape
from svdconvert.layouts.table import LAYOUTS, stored_names
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import TensorInfo


class Scaled(Layout):
    """W = up diag(scale) down, the rows of ``down`` of length 1."""

    name = "scaled"
    bias = "up.bias"
    rank_axis: ClassVar[Mapping[str, int]] = {"down.weight": 0, "scale": 0, "up.weight": 1}

    def weights(self, rank: int, shape: Shape) -> Mapping[str, tuple[int, ...]]:
        return {"down.weight": (rank, shape[1]), "scale": (rank,), "up.weight": (shape[0], rank)}

    def outer_shape(self, stored: Sequence[TensorInfo]) -> Shape:
        return stored[2].shape[0], stored[0].shape[1]

    def factors(self, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        down, scale, up = stored
        return up.double() * scale.double(), down

    def store(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> list[Tensor]:
        lengths = torch.linalg.vector_norm(down, dim=1).clamp_min(1e-30)
        return [(down / lengths[:, None]).to(dtype), lengths.to(dtype), up.to(dtype)]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "scaled", Scaled())  # type: ignore[arg-type]
    # The modeling files, which do not know it, are what a whole check builds the model from.
    monkeypatch.setattr("svdconvert.models.preflight.check_model", lambda source: None)


@pytest.fixture
def scaled(dense: Path, tmp_path: Path) -> Path:
    convert(dense, tmp_path / "scaled", rank=16, layout="scaled", dtype="float32", device="cpu", check=False)
    return tmp_path / "scaled"


def products(folder: Path) -> dict[str, Tensor]:
    """Module path -> what the stored tensors of a factored checkpoint stand for."""
    config, weights = read_config(folder), read_weights(folder)
    return {
        module: LAYOUTS[config["svd_layout"]].product([weights[name] for name in stored_names(config, prefix, module)])
        for prefix in ("gpt_neox.",)
        for module in config["svd_ranks"]
    }


def test_convert(scaled: Path, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "balanced", rank=16, dtype="float32", device="cpu")
    found, expected = products(scaled), products(tmp_path / "balanced")
    assert found.keys() == expected.keys()
    for module, matrix in expected.items():
        torch.testing.assert_close(found[module], matrix, rtol=0, atol=1e-5 * float(matrix.abs().max()))
    layers = (json.loads((folder / "svdconvert.json").read_text()) for folder in (scaled, tmp_path / "balanced"))
    ours, theirs = ({name: told["relative_error"] for name, told in layer["matrices"].items()} for layer in layers)
    assert ours == pytest.approx(theirs, rel=1e-4)
    stored = read_weights(scaled)["gpt_neox.layers.0.attention.dense.scale"]
    assert stored.shape == (16,)


def test_compare(scaled: Path, dense: Path) -> None:
    source = LocalSource(scaled)
    row = factored_architecture(source.config, str(scaled))
    assert all(check.passed for check in compare_tensors(source, LocalSource(dense), row, scaled))
    weights = read_weights(scaled)
    weights["gpt_neox.layers.1.attention.dense.scale"] *= 1.1
    save_file(weights, scaled / "model.safetensors", {"format": "pt"})
    copies, products = compare_tensors(LocalSource(scaled), LocalSource(dense), row, scaled)
    assert copies.passed
    assert not products.passed
    assert products.detail == "not as recorded: layers.1.attention.dense"


def test_densify(scaled: Path, dense: Path, tmp_path: Path) -> None:
    densify(scaled, tmp_path / "dense", device="cpu", check=False)
    weights = read_weights(tmp_path / "dense")
    assert weights.keys() == read_weights(dense).keys()
    expected = products(scaled)
    assert len(expected) == len(TARGETS)
    for module, matrix in expected.items():
        found = weights[f"gpt_neox.{module}.weight"].double()
        torch.testing.assert_close(found, matrix, rtol=0, atol=1e-6 * float(matrix.abs().max()))


def test_fold(scaled: Path, tmp_path: Path) -> None:
    module = "layers.0.attention.dense"
    before = products(scaled)
    m, n = before[module].shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, n, generator=generator), torch.randn(m, 4, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = f"base_model.model.gpt_neox.{module}"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": -2, "target_modules": [f"gpt_neox.{module}"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    fold(scaled, adapter, tmp_path / "folded", device="cpu", check=False)
    assert read_config(tmp_path / "folded")["svd_ranks"][module] == 20
    after = products(tmp_path / "folded")
    wanted = before | {module: before[module] - 0.5 * b.double() @ a.double()}
    for name, matrix in wanted.items():
        torch.testing.assert_close(after[name], matrix, rtol=0, atol=1e-5 * float(matrix.abs().max()))


def test_layers_cannot_share_its_first_factor(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="share_layers") as caught:
        convert(dense, tmp_path / "out", rank=16, layout="scaled", share_layers=2, device="cpu")
    assert set(caught.value.fields) >= {"share_layers", "layout"}
