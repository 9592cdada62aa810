"""What a result holds, for comparing it with another one."""

from __future__ import annotations

from pathlib import Path

import torch

from support.checkpoints import read_config, read_weights


def products(folder: Path) -> dict[str, torch.Tensor]:
    """A factored checkpoint with its factors multiplied out, under the source's names."""
    tensors, shared = read_weights(folder), read_config(folder)["svd_shared"]
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".up.weight"):
            stem = name.removesuffix(".up.weight")
            module = stem.removeprefix("gpt_neox.")
            down = tensors[f"gpt_neox.{shared.get(module, module)}.down.weight"].double()
            up = tensor.double()
            position = tensors.get(f"{stem}.position")
            result[f"{stem}.weight"] = up @ down if position is None else torch.cat([down, up @ down])[position]
        elif name.endswith(".position"):
            pass
        elif name.endswith(".up.bias"):
            result[name.replace(".up.bias", ".bias")] = tensor
        elif not name.endswith(".down.weight"):
            result[name.replace("lm_head", "embed_out")] = tensor
    return result
