"""Granite 4 with experts: stacks under names of their own in files, beside a recurrence and an MLP for all tokens."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import read_weights
from support.families import FAMILIES, read_matrices, rewrite_config, write_family

from svdconvert import convert, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.models import preflight

if "granitemoehybrid" not in FAMILIES:
    pytest.skip("transformers cannot build it", allow_module_level=True)

# the mixture's tensors in published files, and where transformers has them in memory
NAMES = {
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
    "router.layer.weight": "router.weight",
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_files_with_the_names_in_memory(file: str, checkpoints: Any, tmp_path: Path) -> None:
    """The same tensors come out, to the bit, as of files with published names."""
    dense = Path(shutil.copytree(checkpoints.dense("granitemoehybrid"), tmp_path / "dense"))
    weights = read_weights(dense)
    assert sum("block_sparse_moe.input_linear" in name for name in weights) == 3
    for published, own in NAMES.items():
        weights = {
            name.replace(f"block_sparse_moe.{published}", f"block_sparse_moe.{own}"): weights[name] for name in weights
        }
    (dense / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(weights, dense / file)
    else:
        save_file(weights, dense / file, metadata={"format": "pt"})
    convert(dense, tmp_path / "made", keep=0.6, device="cpu", check=False)
    convert(checkpoints.dense("granitemoehybrid"), tmp_path / "expected", keep=0.6, device="cpu", check=False)
    one, two = read_weights(tmp_path / "made"), read_weights(tmp_path / "expected")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not failed(verify(tmp_path / "made", str(checkpoints.dense("granitemoehybrid"))))


def test_what_an_expert_is_and_what_stays(checkpoints: Any) -> None:
    """Slices of two stacks; the router and the recurrence stay bit for bit; densified files have published names."""
    pair, folder = checkpoints.pair("granitemoehybrid"), checkpoints.dense("granitemoehybrid")
    dense, read, factored = read_weights(folder), read_matrices(folder), read_weights(pair.factored)
    again = read_weights(pair.densified)
    for layer in range(3):
        path = f"model.layers.{layer}.block_sparse_moe."
        for expert in range(4):
            for stack, name in (("input_linear", "gate_up_proj"), ("output_linear", "down_proj")):
                own = f"{path}experts.{expert}.{name}"
                assert torch.equal(read[f"{own}.weight"], dense[f"{path}{stack}.weight"][expert])
                product = factored[f"{own}.up.weight"] @ factored[f"{own}.down.weight"]
                made = again[f"{path}{stack}.weight"][expert]
                assert float((made - product).norm()) < 1e-5 * float(product.norm())
        assert torch.equal(factored[f"{path}router.weight"], dense[f"{path}router.layer.weight"])
    assert {name: w.shape for name, w in again.items()} == {name: w.shape for name, w in dense.items()}
    parts = ("A_log", "dt_bias", ".D", "conv1d.weight", "norm.weight", "layernorm.weight")
    kept = [name for name in dense if name.endswith(parts)]
    assert len(kept) > 15
    assert all(torch.equal(dense[name], factored[name]) for name in kept)


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones have the experts in another form; the models without are as old as the family."""
    row = ARCHITECTURES["granitemoehybrid"]
    folder = write_family(tmp_path, "granitemoehybrid")
    monkeypatch.setattr(preflight.transformers, "__version__", "5.12.0")
    with pytest.raises(InputError, match=r"needs transformers 5\.13 or newer.* is 5\.12\.0"):
        convert(folder, tmp_path / "out", keep=0.6, device="cpu")
    without = {"num_local_experts": 0}
    assert row.needs(without) == (5, 0)
    assert not row.has_experts(without)
    module = importlib.import_module(f"svdconvert.modeling.{row.modeling}")
    blocks = [SimpleNamespace(block_sparse_moe=None), SimpleNamespace(block_sparse_moe=SimpleNamespace())]
    module._separate_experts(SimpleNamespace(layers=blocks[:1]))
    with pytest.raises(ImportError, match=r"transformers 5\.13 or newer"):
        module._separate_experts(SimpleNamespace(layers=blocks))


def test_a_config_that_does_not_say_how_many(checkpoints: Any, tmp_path: Path) -> None:
    """Eight, as in the configuration class."""
    source = Path(shutil.copytree(checkpoints.dense("granitemoehybrid"), tmp_path / "dense"))
    rewrite_config(source, num_local_experts=None)
    with pytest.raises(InputError, match=r"lacks model\.layers\.0\.block_sparse_moe\.experts\.4\.gate_up_proj"):
        plan(source, keep=0.6)
