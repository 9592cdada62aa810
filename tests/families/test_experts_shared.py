"""Experts of a layer that share their input-side factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights
from support.families import FAMILIES, full_ranks
from support.running import TOKENS
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, convert, densify, fold, heal, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.methods.table import METHODS
from svdconvert.names import expert, kind, layer_number
from svdconvert.planning.advice import next_steps

MIXTURES = [name for name in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoehybrid") if name in FAMILIES]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"tiger {i} and lion {i * i}" for i in range(200)), encoding="utf-8")
    return Calibration(str(path), samples=4, length=16)


@pytest.mark.parametrize("method", ["svd", "kfac"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_who_shares(model_type: str, method: str, checkpoints: Any, text: Calibration, tmp_path: Path) -> None:
    """All experts of a layer, in each matrix that reads hidden states; what is written is what was planned."""
    dense, row = checkpoints.dense(model_type), ARCHITECTURES[model_type]
    assert row.experts is not None
    known: dict[str, Any] = {} if method == "svd" else {"calibration": text}
    report = convert(dense, tmp_path / "out", keep=0.6, method=method, device="cpu", share_experts=True, **known)
    config = read_config(tmp_path / "out")
    inward = row.experts.targets[:-1]
    members: dict[str, list[str]] = {}
    for path in full_ranks(row, dense):
        if kind(path) in inward:
            members.setdefault(f"{layer_number(path)} {kind(path)}", []).append(path)
    assert all(len(group) == 4 for group in members.values())
    wanted = {path: first for first, *others in members.values() for path in others if first in config["svd_ranks"]}
    assert config["svd_shared"] == wanted
    assert wanted
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.num_parameters() == report.plan.params_after
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--share-experts" in card
    assert "with FSDP, shard a block or more as a unit, not an expert" in card
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    assert record["settings"]["share_experts"] is True
    assert record["settings"]["share_layers"] == 1
    assert not failed(verify(tmp_path / "out", str(dense)))


def test_one_factor_for_the_stack(checkpoints: Any, tmp_path: Path) -> None:
    """Without metrics the products are the truncated SVD of all experts' matrices, one on top of the other."""
    dense = checkpoints.dense("mixtral")
    convert(dense, tmp_path / "out", rank=20, targets=["*.w3"], dtype="float32", device="cpu", share_experts=True)
    weights, found = read_weights(dense), read_weights(tmp_path / "out")
    for layer in range(3):
        path = f"model.layers.{layer}.block_sparse_moe.experts"
        stack = torch.cat([weights[f"{path}.{number}.w3.weight"] for number in range(4)]).double()
        u, s, v = torch.linalg.svd(stack, full_matrices=False)
        best = (u[:, :20] * s[:20]) @ v[:20]
        down = found[f"{path}.0.w3.down.weight"]
        made = torch.cat([found[f"{path}.{number}.w3.up.weight"] @ down for number in range(4)])
        assert float((made - best).norm()) < 1e-4 * float(best.norm())
        assert sum(".down." in name for name in found if name.startswith(path)) == 1


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_expert_that_is_damaged_is_named(allocation: str, checkpoints: Any, tmp_path: Path) -> None:
    dense = checkpoints.dense("mixtral")
    (tmp_path / "model").mkdir()
    weights, name = read_weights(dense), "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    weights[name][5, 7] = torch.nan
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_bytes((dense / "config.json").read_bytes())
    with pytest.raises(InputError, match=f"tensor {name} cannot be converted: it has NaN"):
        convert(tmp_path / "model", tmp_path / "out", keep=0.6, share_experts=True, allocation=allocation, device="cpu")
    assert not (tmp_path / "out" / "config.json").exists()


def test_densified_folded_and_adapted(checkpoints: Any, tmp_path: Path) -> None:
    """The same logits as stacks of dense experts; an adapter on some of them is folded in."""
    dense = checkpoints.dense("mixtral")
    convert(dense, tmp_path / "out", keep=0.6, dtype="float32", device="cpu", share_experts=True)
    densify(tmp_path / "out", tmp_path / "dense", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        own, plain = model(TOKENS.ids).logits, stock(TOKENS.ids).logits
    assert float((own - plain).abs().max()) < 1e-4 * float(own.abs().max())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*experts\.[13]\.w[12]", init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.1)
        wanted = adapted(input_ids=TOKENS.ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    fold(tmp_path / "out", tmp_path / "adapter", tmp_path / "folded", device="cpu")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", trust_remote_code=True).eval()
    with torch.no_grad():
        found = folded(TOKENS.ids).logits
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())


def test_healed_block_by_block(checkpoints: Any, text: Calibration, tmp_path: Path) -> None:
    """Their group lies in one block; a refit, which does not go with it, is not advised."""
    dense, how = checkpoints.dense("mixtral"), {"device": "cpu", "check": False}
    made = convert(dense, tmp_path / "out", keep=0.6, calibration=text, method="whiten", share_experts=True, **how)
    advice = next_steps(METHODS["whiten"], made.plan.settings, tmp_path / "out").marked
    assert "svdconvert heal" in advice
    assert "refit" not in advice
    more = Calibration(text.text, samples=32, length=16)
    healed = heal(tmp_path / "out", dense, more, tmp_path / "healed", how="blocks", epochs=4, lr=1e-3, **how)
    assert healed.record["healing"]["after"]["kl"] < healed.record["healing"]["before"]["kl"]
    assert not failed(verify(tmp_path / "healed", str(dense)))


def test_refused(checkpoints: Any) -> None:
    mixture = checkpoints.dense("mixtral")
    for how, message in (
        ({"share_layers": 2}, "share_layers=2 does not go with share_experts=True"),
        ({"layout": "pivoted"}, "share_experts=True does not go with layout='pivoted'"),
        ({"targets": ["q_proj"]}, "share_experts=True has nothing to share"),
        ({"targets": ["*.w2"]}, "no layer has two experts whose matrices that read hidden states are factored"),
        ({"keep": None, "rank": {"*": 8, "experts.1.*": 4}}, "leave out share_experts"),
    ):
        with pytest.raises(InputError, match=message):
            plan(mixture, **{"keep": 0.6, "share_experts": True, **how})
    with pytest.raises(InputError, match="llama models have no experts"):
        plan(checkpoints.dense("llama"), keep=0.6, share_experts=True)


def test_a_group_is_one_matrix_to_the_budget(checkpoints: Any) -> None:
    """Its factor counts once, and of what is kept as much as is asked for is spent."""
    made = plan(checkpoints.dense("mixtral"), keep=0.6, share_experts=True)
    groups = [target for target in made.targets if target.followers]
    assert len(groups) == 6
    for target in groups:
        assert {expert(part.module) for part in target.parts} == {
            f"layers.{layer_number(target.module)}.block_sparse_moe.experts.{number}" for number in range(4)
        }
        rank = target.rank or 0
        assert target.params == rank * (64 + 4 * 128) <= 0.6 * target.dense_params < (rank + 1) * (64 + 4 * 128)
    assert made.params_after == sum(info.size for infos in made.shards.values() for info in infos)
