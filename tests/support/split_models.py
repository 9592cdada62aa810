"""Tiny models whose fused projections are in parts, and what the tests of them have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from support.families import FAMILIES, VOCAB
from svdconvert.families.table import ARCHITECTURES
from svdconvert.planning.targets import find_targets
from svdconvert.storage.source import LocalSource

# Families with fused projections.
SPLIT = [name for name in FAMILIES if ARCHITECTURES[name].fused]
PARTS = ("query", "key", "value")
IDS = torch.randint(4, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))


def ranks(folder: Path, share: float = 1.0) -> dict[str, int]:
    """A share of the full rank of every target, in parts."""
    targets = find_targets(LocalSource(folder), (), split_fused=True)
    return {target.module: max(int(share * min(target.shape)), 1) for target in targets}


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values())
    return model.eval()


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def outputs(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs of each part, from what the attention of the stock model does with them."""
    if config["model_type"] == "gpt_neox":  # view(..., heads, 3 * head size), then chunk(3)
        heads = config["num_attention_heads"]
        places = torch.arange(3 * config["hidden_size"]).view(heads, -1).chunk(3, dim=1)
    elif config["model_type"] == "phi3":
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        places = torch.arange((heads + 2 * groups) * size).split([heads * size, groups * size, groups * size])
    else:
        places = torch.arange(3 * config["n_embd"]).split(config["n_embd"])
    return {name: place.flatten() for name, place in zip(PARTS, places, strict=True)}
