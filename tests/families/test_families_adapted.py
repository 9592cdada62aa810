"""Every family with LoRA adapters, and in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_config
from support.families import (
    VERSION,
    full_ranks,
)
from support.pairs import Pair
from support.representatives import UNLIKE
from support.running import DTYPE, IDS, distance, load, logits
from transformers import (
    AutoModelForCausalLM,
)

from svdconvert import convert, fold
from svdconvert.families.row import Architecture


def target_names(row: Architecture) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in row.targets})


@UNLIKE
def test_lora_runs_beside_the_product_and_folds(row: Architecture, pair: Pair, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=target_names(row), task_type="CAUSAL_LM")
    model = get_peft_model(load(pair.factored), config).eval()
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    prefix = f"base_model.model.{row.prefix}"
    assert {name.removeprefix(prefix) for name in wrapped} >= set(read_config(pair.factored)["svd_ranks"])
    assert len(wrapped) == len(full_ranks(row, pair.densified))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fold(pair.factored, tmp_path / "adapter", tmp_path / "folded", device="cpu")
    assert distance(expected, logits(pair.model)) > 0.05
    assert distance(logits(load(tmp_path / "folded")), expected) < 1e-4
    with pytest.raises(RuntimeError, match="svdconvert fold"):
        model.merge_and_unload()


@UNLIKE
@pytest.mark.skipif(VERSION < (4, 57), reason="no bitsandbytes with CPU kernels for this transformers")
def test_four_bit_loading(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """At ranks of 64: on CPUs with AVX512-BF16, bitsandbytes takes 4-bit layers with a multiple of 64 inputs only."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    ranks = {module: rank for module, rank in full_ranks(row, dense).items() if rank == 64}
    convert(dense, tmp_path, rank=ranks, factor_all=True, device="cpu", check=False)
    # and layers of a multiple of 32 outputs
    narrow = [name.rpartition(".")[2] for name in row.gates]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", *narrow] if narrow else None,
    )
    options: dict[str, Any] = {"quantization_config": settings, "device_map": "cpu", DTYPE: torch.float32}
    model = load(tmp_path, **options)
    kinds = {name.removeprefix(row.prefix): type(module).__name__ for name, module in model.named_modules()}
    for path in ranks:
        assert kinds[path] == "AdaptableSVDLinear"
        assert kinds[f"{path}.down"] == kinds[f"{path}.up"] == "Linear4bit"
    expected = logits(AutoModelForCausalLM.from_pretrained(dense).eval())
    error = float((logits(model) - expected).pow(2).mean().sqrt() / expected.std())
    assert 1e-4 < error < 0.8
    # not the same object: after inference, bitsandbytes on a CPU adds biases in place, which cannot be differentiated
    model = prepare_model_for_kbit_training(load(tmp_path, **options))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=target_names(row), task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
