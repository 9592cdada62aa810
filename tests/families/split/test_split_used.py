"""Fused projections in parts, together with shared factors, adapters, 4 bits and the other commands."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_config
from support.families import VERSION, write_family
from support.pairs import Pair
from support.split_models import IDS, PARTS, distance, load, logits, ranks, stock
from transformers import AutoConfig

from svdconvert import ablate, convert, densify, fold, verify
from svdconvert.commands.verify import failed
from svdconvert.families.fused import fused_layer
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES


def test_layers_that_share(row: Architecture, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", keep=0.6, share_layers=2, split_fused=True, device="cpu")
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    model = load(tmp_path / "out")
    assert len(model.config.svd_shared) == len(row.targets) + 2
    assert distance(logits(model), logits(stock(tmp_path / "densified"))) < 1e-4
    assert not failed(verify(tmp_path / "out", str(dense)))


def test_adapters_of_parts(row: Architecture, pair: Pair, tmp_path: Path) -> None:
    """LoRA on factored parts and on the dense one, by the names that the card gives, and folded into them."""
    from peft import LoraConfig, get_peft_model

    card = (pair.factored / "README.md").read_text()
    names = ast.literal_eval(card.partition("target_modules = ")[2].partition("\n")[0])
    assert set(PARTS) < set(names)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(load(pair.factored), config).eval()
    generator = torch.Generator().manual_seed(1)
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(wrapped) == 3 * (len(row.targets) + 2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fold(pair.factored, tmp_path / "adapter", tmp_path / "folded", device="cpu")
    assert distance(expected, logits(load(pair.factored))) > 0.01
    assert distance(logits(load(tmp_path / "folded")), expected) < 1e-4
    densify(tmp_path / "folded", tmp_path / "densified", device="cpu")
    assert distance(logits(stock(tmp_path / "densified")), expected) < 1e-4


@pytest.mark.skipif(VERSION < (4, 57), reason="no bitsandbytes with CPU kernels for this transformers")
def test_four_bit_loading(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """Factored parts at ranks of 64, and one that stays dense."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    wanted = {module: rank for module, rank in ranks(dense).items() if rank == 64 and not module.endswith("key")}
    convert(dense, tmp_path, rank=wanted, factor_all=True, split_fused=True, device="cpu", check=False)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load(tmp_path, quantization_config=quantised, device_map="cpu", dtype=torch.float32)
    kinds = {name.removeprefix(row.prefix): type(module).__name__ for name, module in model.named_modules()}
    parts = [module for module in wanted if fused_layer(row, module)]
    assert parts
    for path in parts:
        assert kinds[f"{path}.down"] == kinds[f"{path}.up"] == "Linear4bit"
        assert kinds[f"{fused_layer(row, path)}.key"] == "Linear4bit"
    expected = logits(stock(dense))
    error = float((logits(model) - expected).pow(2).mean().sqrt() / expected.std())
    assert 1e-4 < error < 0.8


def test_ablation_of_all_but_nothing(row: Architecture, dense: Path, text: Path, tmp_path: Path) -> None:
    """Without all singular values in one group the fused matrices are zeros, as they are when they are whole."""
    (name,) = row.fused
    options: dict[str, Any] = {"groups": 1, "targets": [name], "window": 16, "device": "cpu"}
    _, parts = ablate(dense, text, split_fused=True, **options)
    _, whole = ablate(dense, text, **options)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_tensor_parallel_plan(row: Architecture, pairs: Any) -> None:
    config = AutoConfig.from_pretrained(pairs["balanced"].factored, trust_remote_code=True)
    (name,) = row.fused
    block = f"{'h' if row.model_type == 'gpt2' else 'layers'}.*.{name.rpartition('.')[0]}"
    blocks = [block.replace("*", str(index)) for index in range(3)]
    config.svd_ranks = {}
    whole = {rule: style for rule, style in config.base_model_tp_plan.items() if rule.startswith(block)}
    if not whole:
        pytest.skip("no plan for this family in this version")
    last = name.rpartition(".")[2]
    config.svd_ranks = {f"{own}.{last}.{part}": 4 for own in blocks for part in PARTS if part != "value"}
    split = {rule: style for rule, style in config.base_model_tp_plan.items() if rule.startswith(block)}
    style = whole.pop(f"{block}.{last}")
    assert split == whole | {f"{block}.{last}.{part}{'' if part == 'value' else '.up'}": style for part in PARTS}
    del config.svd_ranks[f"{blocks[2]}.{last}.key"]
    assert not [rule for rule in config.base_model_tp_plan if rule.startswith(block)]
    config.svd_ranks = {f"{blocks[0]}.{last}.{part}": 4 for part in PARTS}
    assert not [rule for rule in config.base_model_tp_plan if rule.startswith(block)]


def test_from_the_command_line(run: Any, tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", "gpt_neox")
    done = run(dense, "--keep", 0.6, "--split-fused", "--out", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    assert sum(module.endswith(".query") for module in read_config(tmp_path / "out")["svd_ranks"]) == 3
    done = run("verify", tmp_path / "out", "--against", dense)
    assert done.code == 0, done.out + done.err


def test_sweep(text: Path, run: Any, tmp_path: Path) -> None:
    dense, row = write_family(tmp_path / "dense", "gpt_neox"), ARCHITECTURES["gpt_neox"]
    options = ("--text", text, "--keep", 0.6, "--window", 16, "--split-fused", "--no-plot", "--out", tmp_path / "out")
    done = run("sweep", dense, *options, "--keep-models")
    assert done.code == 0, done.err
    (config,) = (tmp_path / "out" / "models").glob("*/config.json")
    assert any(fused_layer(row, module) for module in read_config(config.parent)["svd_ranks"])
    done = run("sweep", dense, *(option for option in options if option != "--split-fused"))
    assert done.code == 2
    assert "split fused" in done.err
