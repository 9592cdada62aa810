"""Families whose published models differ in more than their sizes: every such form against the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import read_config
from support.families import FAMILIES, full_ranks, stock_model, write_family
from support.naive_experts import with_naive_experts
from support.running import MASK, by_block, distance, load, logits
from transformers import AutoModelForCausalLM

from svdconvert import convert
from svdconvert.families.table import ARCHITECTURES

# Changes to the tiny model of the row.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-7b": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None}),
    "falcon-11b": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "falcon-rw": (
        "falcon",
        {
            "alibi": True,
            "bias": True,
            **dict.fromkeys(("new_decoder_architecture", "multi_query", "parallel_attn"), False),
            "num_kv_heads": None,
        },
    ),
    "santacoder with all heads": ("gpt_bigcode", {"multi_query": False}),
    "bloom with heads that are no power of two": ("bloom", {"hidden_size": 96, "num_attention_heads": 6}),
    "falcon h1 without norms of its states": ("falcon_h1", {"mamba_rms_norm": False}),
    "granite 4 without experts": ("granitemoehybrid", {"num_local_experts": 0}),
    "granite 4 without positions": ("granitemoehybrid", {"position_embedding_type": None}),
    "granite 4 with attention alone": ("granitemoehybrid", {"layer_types": ["attention"] * 3, "num_local_experts": 0}),
    "mpt with heads that are no power of two": ("mpt", {"hidden_size": 96, "num_attention_heads": 6}),
}


@pytest.mark.parametrize("form", [form for form, (family, _) in FORMS.items() if family in FAMILIES])
def test_full_rank_equals_the_stock_model(form: str, tmp_path: Path) -> None:
    """Its parameters, its logits with and without padding, and those of a block at a time."""
    family, changes = FORMS[form]
    row, dense = ARCHITECTURES[family], write_family(tmp_path / "dense", family, **changes)
    expected = with_naive_experts(stock_model(family, **changes), row)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.named_parameters()}
    assert row.parameters(read_config(dense)) == shapes
    convert(dense, tmp_path / "out", rank=full_ranks(row, dense), factor_all=True, device="cpu")
    model, stock = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense).eval()
    assert distance(logits(model), logits(stock)) < 1e-4
    ours, theirs = logits(model, mask=MASK.long()), logits(stock, mask=MASK.long())
    assert distance(ours[MASK], theirs[MASK]) < 1e-4
    assert distance(by_block(dense), logits(stock)) < 1e-4
