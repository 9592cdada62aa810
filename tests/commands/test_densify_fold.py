"""Back to the stock architecture, and LoRA adapters merged into factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import TARGETS, read_config, read_weights
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from svdconvert import InputError, convert, densify, fold

IDS = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(0))
MODULES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


FACTORED = ["query_key_value", "attention.dense", "dense_h_to_4h"]


@pytest.fixture(scope="module", params=["balanced", "pivoted", "shared"])
def precise(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factored in float32 with one kind of target left dense, so that no rounding hides an error."""
    folder = tmp_path_factory.mktemp("precise") / "model"
    how = {"share_layers": 2} if request.param == "shared" else {"layout": request.param}
    convert(dense, folder, rank=16, targets=FACTORED, device="cpu", dtype="float32", **how)
    assert len(read_config(folder)["svd_shared"]) == (3 if request.param == "shared" else 0)
    assert "layers.0.mlp.dense_4h_to_h" not in read_config(folder)["svd_ranks"]
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        return model.eval().float()(IDS).logits


@pytest.mark.parametrize("limit", ["5GB", "40kB"])
def test_densify(precise: Path, dense: Path, tmp_path: Path, limit: str) -> None:
    densify(precise, tmp_path / "out", device="cpu", max_shard_size=limit)
    with torch.inference_mode():
        model, info = GPTNeoXForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        found = model.eval()(IDS).logits
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert float((found - logits(precise)).abs().max()) < 1e-5
    weights = read_weights(tmp_path / "out")
    assert weights.keys() == read_weights(dense).keys()
    assert "embed_out.weight" in weights


def test_densified_config_is_stock(precise: Path, dense: Path, tmp_path: Path) -> None:
    """What stock loaders and GGUF conversion read, in the spelling of transformers 4 and 5."""
    densify(precise, tmp_path / "out", device="cpu")
    config = read_config(tmp_path / "out")
    assert config["model_type"] == "gpt_neox"
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert not {"auto_map", "svd_ranks", "svd_layout", "svd_shared"} & config.keys()
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.5, 10000)
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_densify_then_convert_is_the_identity(precise: Path, tmp_path: Path) -> None:
    """A product of rank 16 factored at rank 16 is itself."""
    densify(precise, tmp_path / "dense", device="cpu")
    report = convert(tmp_path / "dense", tmp_path / "again", rank=16, targets=FACTORED, device="cpu")
    assert max(report.errors) < 1e-5
    assert float((logits(tmp_path / "again") - logits(precise)).abs().max()) < 1e-4


def adapter(base: Path, folder: Path, **settings: object) -> torch.Tensor:
    """Save a LoRA adapter with random weights; returns the logits of base and adapter together."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "target_modules": MODULES, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True), LoraConfig(**options)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["query_key_value", "dense_h_to_4h"]},
        {"rank_pattern": {"dense_h_to_4h": 8}, "alpha_pattern": {"dense_h_to_4h": 24}},
        {"lora_alpha": -3},
        {"target_modules": "all-linear"},
    ],
    ids=["all", "rslora", "some", "patterns", "negative", "all-linear"],
)
def test_fold_is_exact(settings: dict[str, object], precise: Path, tmp_path: Path) -> None:
    expected = adapter(precise, tmp_path / "adapter", **settings)
    fold(precise, tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert float((expected - logits(precise)).abs().max()) > 0.1  # the adapter does something
    assert float((logits(tmp_path / "out") - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_ranks_grow_by_the_adapters(precise: Path, tmp_path: Path) -> None:
    adapter(precise, tmp_path / "adapter", target_modules=["query_key_value", "dense_4h_to_h"])
    fold(precise, tmp_path / "adapter", tmp_path / "out", device="cpu")
    ranks = read_config(tmp_path / "out")["svd_ranks"]
    shared = read_config(precise)["svd_shared"]
    assert read_config(tmp_path / "out")["svd_shared"] == shared
    # a group has the ranks of the adapters of all its layers
    assert [ranks[f"layers.{n}.attention.query_key_value"] for n in range(3)] == ([24, 24, 20] if shared else [20] * 3)
    assert ranks["layers.1.attention.dense"] == 16
    # Dense layers take a LoRA in the usual way.
    assert "layers.1.mlp.dense_4h_to_h" not in ranks
    assert len(ranks) == len(TARGETS) - 3
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    weights = read_weights(tmp_path / "out").values()
    assert record["params"] == sum(tensor.numel() for tensor in weights if tensor.is_floating_point())


def test_fold_twice_and_densify(precise: Path, tmp_path: Path) -> None:
    """Results of fold are sources like any other."""
    adapter(precise, tmp_path / "a")
    fold(precise, tmp_path / "a", tmp_path / "one", device="cpu")
    expected = adapter(tmp_path / "one", tmp_path / "b")
    fold(tmp_path / "one", tmp_path / "b", tmp_path / "two", device="cpu")
    densify(tmp_path / "two", tmp_path / "dense", device="cpu")
    assert float((logits(tmp_path / "dense") - expected).abs().max()) < 5e-5 * float(expected.abs().max())


@pytest.mark.parametrize("layer", [0, 1])
def test_fold_into_one_of_the_layers_that_share(layer: int, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "model", rank=16, share_layers=3, device="cpu", dtype="float32")
    expected = adapter(tmp_path / "model", tmp_path / "adapter", target_modules=[f"layers.{layer}.attention.dense"])
    fold(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", device="cpu")
    config, before = read_config(tmp_path / "out"), read_config(tmp_path / "model")
    assert config["svd_shared"] == before["svd_shared"]
    wider = {f"layers.{n}.attention.dense": 20 for n in range(3)}
    assert config["svd_ranks"] == before["svd_ranks"] | wider
    assert float((logits(tmp_path / "out") - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_fold_beyond_the_rank_of_a_group(dense: Path, tmp_path: Path) -> None:
    convert(
        dense, tmp_path / "model", rank=50, share_layers=3, targets=["mlp.dense_h_to_4h"], device="cpu", check=False
    )
    adapter(tmp_path / "model", tmp_path / "adapter", r=8, target_modules=["dense_h_to_4h"])
    with pytest.raises(InputError, match="to rank 74, more than a 768 x 64 matrix including the layers that share"):
        fold(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", device="cpu")


def test_fold_beyond_the_full_rank_is_refused(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "model", rank=62, layout="pivoted", device="cpu", check=False)
    adapter(tmp_path / "model", tmp_path / "adapter", target_modules=["attention.dense"])
    with pytest.raises(InputError, match="densify"):
        fold(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_fold_of_adapters_on_the_factors(precise: Path, tmp_path: Path) -> None:
    """LoRA on each factor is no parallel product; as a merge into two dense layers it is exact all the same."""
    expected = adapter(precise, tmp_path / "adapter", target_modules=["down", "up"])
    fold(precise, tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert read_config(tmp_path / "out")["svd_ranks"] == read_config(precise)["svd_ranks"]
    assert float((logits(tmp_path / "out") - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_fold_leaves_no_trained_biases_behind(precise: Path, tmp_path: Path) -> None:
    adapter(precise, tmp_path / "adapter", bias="lora_only")
    with pytest.raises(InputError, match='its bias is "lora_only"'):
        fold(precise, tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
