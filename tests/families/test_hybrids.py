"""Models whose blocks are of several kinds: what their files and config.json may hold beside the usual."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import read_config, read_weights
from support.families import FAMILIES, VERSION, rewrite_config, write_family
from support.running import IDS, distance, load, logits
from transformers import AutoModelForCausalLM

from svdconvert import convert, densify, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES

MIXERS = [name for name in FAMILIES if ARCHITECTURES[name].mixer]
PREDICTING = [name for name in FAMILIES if ARCHITECTURES[name].predictors]
DELTA_NETS = [name for name in FAMILIES if "linear_attn" in ARCHITECTURES[name].kinds]
# The kinds of the tiny models' blocks, as published configs give them: every so many-th attends, or those of a list.
RHYTHMS: dict[str, dict[str, Any]] = {name: {"full_attention_interval": 2} for name in DELTA_NETS}
if "lfm2" in FAMILIES:
    RHYTHMS["lfm2"] = {"full_attn_idxs": [1], "intermediate_size": None, "block_ff_dim": 128}

if not DELTA_NETS:
    pytest.skip("transformers has no family of this kind yet", allow_module_level=True)


@pytest.mark.parametrize("model_type", PREDICTING)
def test_layers_that_predict_further_tokens_are_left_out(model_type: str, checkpoints: Any, tmp_path: Path) -> None:
    """As transformers leaves them out when it loads the dense model; and the plan says so."""
    dense = checkpoints.dense(model_type)
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    weights = load_file(source / "model.safetensors")
    block = {name: tensor for name, tensor in weights.items() if name.startswith("model.layers.1.")}
    extra = {f"mtp.layers.0.{name[15:]}": tensor + 1 for name, tensor in block.items()}
    extra["mtp.fc.weight"] = torch.ones(64, 128)
    save_file({**weights, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    report = convert(source, tmp_path / "made", keep=0.6, device="cpu")
    (note,) = (note for note in report.plan.notes if "further tokens" in note)
    assert note.startswith(f"{len(extra)} tensors of layers that predict further tokens are left out (mtp.*)")
    convert(dense, tmp_path / "without", keep=0.6, device="cpu", check=False)
    one, two = read_weights(tmp_path / "made"), read_weights(tmp_path / "without")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not failed(verify(tmp_path / "made", str(source)))
    densify(tmp_path / "made", tmp_path / "plain", device="cpu")
    assert read_weights(tmp_path / "plain").keys() == read_weights(dense).keys()
    AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize("model_type", RHYTHMS)
def test_kinds_by_their_rhythm(model_type: str, checkpoints: Any, tmp_path: Path) -> None:
    dense = checkpoints.dense(model_type)
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    rewrite_config(source, layer_types=None, **RHYTHMS[model_type])
    convert(source, tmp_path / "made", keep=0.6, device="cpu")
    made, expected = load(tmp_path / "made"), checkpoints.pair(model_type).model
    assert made.config.layer_types == expected.config.layer_types == read_config(dense)["layer_types"]
    densify(tmp_path / "made", tmp_path / "plain", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert distance(logits(made), logits(stock)) < 1e-4
    made.save_pretrained(tmp_path / "again")
    assert distance(logits(load(tmp_path / "again")), logits(made)) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "num_hidden_layers 3, but has 2 layer_types"),
        ({"layer_types": ["linear_attention", "conv", "full_attention"]}, "a list of linear_attention or full_attent"),
        ({"layer_types": ["full_attention"] * 3}, "lacks model.layers.0.self_attn"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval.*from 1"),
    ],
)
def test_kinds_that_cannot_be(changes: dict[str, Any], words: str, checkpoints: Any, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    shutil.copytree(checkpoints.dense(DELTA_NETS[0]), source)
    rewrite_config(source, **changes)
    with pytest.raises(InputError, match=words):
        plan(source, keep=0.6)


@pytest.mark.skipif(VERSION < (5,), reason="the kernel has another place in transformers 4")
@pytest.mark.parametrize("model_type", MIXERS)
def test_no_fused_kernel_in_training(model_type: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the weight of the output projection, whose factors would get no gradients."""
    row, folder = ARCHITECTURES[model_type], checkpoints.dense(model_type).parent / "trained"
    targets = [name for name in row.targets if name.startswith("mamba.")]
    convert(checkpoints.dense(model_type), folder, keep=0.6, targets=targets, device="cpu", check=False)
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    asked = []
    monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", lambda *args, **options: asked.append(options))
    stock, model = AutoModelForCausalLM.from_pretrained(checkpoints.dense(model_type)), load(folder)
    model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert not asked
    factors = [p for name, p in model.named_parameters() if ".out_proj." in name]
    assert len(factors) >= 4
    assert all(float(p.grad.abs().max()) > 0 for p in factors if p.dim() == 2)
    assert {module.training for module in model.modules() if not type(module).__name__.startswith("Unfused")} == {True}
    stock.train()(input_ids=IDS, use_cache=False)
    assert asked


@pytest.mark.skipif("falcon_h1" not in FAMILIES, reason="transformers does not have it yet")
def test_falcon_without_a_rotary_base(checkpoints: Any, tmp_path: Path) -> None:
    """Of which transformers 4 and 5 think differently."""
    source = Path(shutil.copytree(checkpoints.dense("falcon_h1"), tmp_path / "dense"))
    rewrite_config(source, rope_parameters=None, rope_theta=None)
    with pytest.raises(InputError, match=r"'falcon_h1' and no rope_theta, .*; add it to its config\.json"):
        plan(source, keep=0.6)
    for settings in ({"rope_theta": 1e11}, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e11}}):
        rewrite_config(source, **settings)
        assert plan(source, keep=0.6)


@pytest.mark.skipif("granitemoehybrid" not in FAMILIES, reason="transformers cannot build it")
def test_a_kind_that_no_block_is_of_needs_no_fields(tmp_path: Path) -> None:
    """As in the Granites 4 whose blocks all attend."""
    dense = write_family(tmp_path / "dense", "granitemoehybrid", layer_types=["attention"] * 3)
    fields = [name for name in read_config(dense) if name.startswith("mamba_")]
    assert len(fields) > 6
    before = plan(dense, keep=0.6).params_before
    rewrite_config(dense, **dict.fromkeys(fields))
    assert plan(dense, keep=0.6).params_before == before


def test_kinds_have_the_names_that_every_version_reads(checkpoints: Any, tmp_path: Path) -> None:
    """transformers 5 writes others, which 4 refuses."""
    names = ["mamba", "attention", "mamba"]
    folder = checkpoints.pair("granitemoehybrid")
    load(folder.factored).save_pretrained(tmp_path)
    for made in (folder.factored, folder.densified, tmp_path):
        assert read_config(made)["layer_types"] == names


def test_what_stays(checkpoints: Any) -> None:
    """The recurrence, the router, and the narrow projections that set them for each token."""
    dense = checkpoints.dense(DELTA_NETS[0])
    folder = checkpoints.pair(DELTA_NETS[0]).factored
    before, after = read_weights(dense), read_weights(folder)
    parts = ("A_log", "dt_bias", "conv1d.weight", "norm.weight", "in_proj_ba.weight", "gate.weight")
    kept = [name for name in before if name.endswith(parts)]
    assert len(kept) > 15
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert json.loads((folder / "config.json").read_text())["layer_types"] == read_config(dense)["layer_types"]


def test_parameters_of_a_published_model() -> None:
    """Qwen3-Next-80B-A3B: 80 billion, without the layers that predict further tokens."""
    config = {
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts"), 512),
        "vocab_size": 151936,
    }
    shapes = ARCHITECTURES["qwen3_next"].parameters(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == 79_674_391_296
