"""Models whose blocks are of several kinds: what their files and config.json may hold beside the usual."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import read_config, read_weights
from support.families import FAMILIES, rewrite_config
from support.running import distance, load, logits
from transformers import AutoModelForCausalLM

from svdconvert import convert, densify, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES

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
    made, expected = load(tmp_path / "made"), load(checkpoints.pairs(model_type)["balanced"].factored)
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


def test_what_stays(checkpoints: Any) -> None:
    """The recurrence, the router, and the narrow projections that set them for each token."""
    dense = checkpoints.dense(DELTA_NETS[0])
    folder = checkpoints.pairs(DELTA_NETS[0])["balanced"].factored
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
