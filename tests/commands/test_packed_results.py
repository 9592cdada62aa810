"""Commands on a result whose weights are packed integers; none of them needs compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights
from support.packed import as_floats, mixed, pack_folder

from svdconvert import convert, densify, evaluate, fold, verify
from svdconvert.commands.verify import failed

Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def pair(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A packed result, dense layers among its packed ones, and the same as float32. Read only."""
    place = tmp_path_factory.mktemp("packed")
    targets = ["attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    convert(dense, place / "plain", rank=16, targets=targets, device="cpu")
    values = pack_folder(place / "plain", place / "packed", mixed)
    return SimpleNamespace(packed=place / "packed", floats=as_floats(place / "packed", values, place / "floats"))


def test_verify(dense: Path, pair: SimpleNamespace, tmp_path: Path) -> None:
    checks = {check.name: check for check in verify(pair.packed, dense)}
    assert not failed(list(checks.values()))
    assert checks["packed weights"].detail.startswith("3 at 3 bits, 3 at 4 bits in groups of 8, ")
    assert checks["factored matrices"].detail.startswith("9 multiplied out")
    assert checks["rounded matrices"].detail.startswith("1 rounded")  # the dense layer that is packed
    tensors = read_weights(pair.packed)
    scale = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[scale][0] = torch.inf
    (tmp_path / "config.json").write_text(json.dumps(read_config(pair.packed)))
    save_file(tensors, tmp_path / "model.safetensors")
    wrong = {check.name: check.detail for check in failed(verify(tmp_path))}
    assert wrong["packed weights"] == f"{scale.removesuffix('_scale')} has scales that are NaN or infinite"


def test_evaluate(pair: SimpleNamespace, text: Path) -> None:
    ours, theirs = (evaluate(folder, text, device="cpu") for folder in (pair.packed, pair.floats))
    assert ours.perplexity == theirs.perplexity
    assert ours.parameters == theirs.parameters


def test_densify(pair: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("packed", "floats"):
        densify(getattr(pair, name), tmp_path / name, device="cpu")
    ours, theirs = (read_weights(tmp_path / name) for name in ("packed", "floats"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half()) for name in ours)
    config = read_config(tmp_path / "packed")
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float16"


def test_fold(pair: SimpleNamespace, tmp_path: Path, run: Run) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    # of factors, and of a dense layer that is packed
    for layer, (rows, columns) in {"mlp.dense_h_to_4h": (256, 64), "attention.dense": (64, 64)}.items():
        name = f"base_model.model.gpt_neox.layers.0.{layer}.lora_"
        tensors[f"{name}A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{name}B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["dense_h_to_4h", "dense"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    done = run("fold", pair.packed, "--adapter", adapter, "--out", tmp_path / "packed", "--device", "cpu")
    assert done.code == 0, done.err
    assert "has packed weights" in done.out
    fold(pair.floats, adapter, tmp_path / "floats", device="cpu")
    ours, theirs = (read_weights(tmp_path / name) for name in ("packed", "floats"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)
    assert "quantization_config" not in read_config(tmp_path / "packed")
