"""Random experts of gpt-oss in MXFP4, as the published files have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def packed_experts(config: Mapping[str, Any], layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random experts of a layer of gpt-oss as its files have them, in MXFP4."""
    count, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    found = {}
    for stack, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        name = f"model.layers.{layer}.mlp.experts.{stack}"
        groups = (count, rows, columns // 32)
        found[f"{name}_blocks"] = torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=generator)
        found[f"{name}_scales"] = torch.randint(119, 122, groups, dtype=torch.uint8, generator=generator)
        found[f"{name}_bias"] = torch.zeros(count, rows, dtype=torch.bfloat16)
    return found
