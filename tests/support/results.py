"""What a result holds, for comparing it with another one."""

from __future__ import annotations

import json
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


def files(folder: Path) -> dict[str, bytes]:
    """All files of a result, the record without its times."""
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    record = json.loads(content["svdconvert.json"])
    record.pop("timing")
    for matrix in record["matrices"].values():
        matrix.pop("seconds")
    content["svdconvert.json"] = json.dumps(record).encode()
    return content
