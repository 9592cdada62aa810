"""Results whose weights lie on integer grids, made of those that a conversion wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.checkpoints import read_config, read_weights
from svdconvert.families.table import FACTORED
from svdconvert.grids import SUFFIXES, Grid
from svdconvert.linalg.integers import nearest
from svdconvert.storage.packed_config import is_packable, quantization_config
from svdconvert.tensors import CODES, TensorInfo

# (name of a weight, its shape) -> the grid that it is rounded to, or None
Grids = Callable[[str, tuple[int, ...]], Grid | None]


def factors_at(bits: int, group: int = 0) -> Grids:
    """All factors on one grid."""
    return lambda name, shape: Grid(bits, group) if name.endswith((".down.weight", ".up.weight")) else None


def mixed(name: str, shape: tuple[int, ...]) -> Grid | None:
    """Several widths: by layer and factor; of dense linear layers 8 bits, the first layer's alone."""
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), -1)
    if layer < 0 or len(shape) != 2:
        return None
    if name.endswith(".down.weight"):
        return Grid(6 if layer else 3)
    if name.endswith(".up.weight"):
        return Grid((4, 5, 8)[layer % 3], 8 if shape[1] % 8 == 0 else 0)
    return None if layer else Grid(8, 16)


def pack_folder(folder: Path, out: Path, grids: Grids, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Round the weights of a result, and store them packed.

    Args:
        folder: a factored checkpoint.
        out: folder to write.
        grids: of which weights.
        dtype: of the scales; by default the weights' own.

    Returns:
        The tensors of the result in float32, the rounded ones multiplied out.
    """
    config, tensors = read_config(folder), read_weights(folder)
    row = FACTORED[config["model_type"]]
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*", "svdconvert.json"))
    stored, values, chosen = {}, {}, {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        grid = grids(name, shape) if name.endswith(".weight") and is_packable(name, row) else None
        if grid is None:
            stored[name], values[name] = tensor, tensor if tensor.dtype == torch.int64 else tensor.float()
            continue
        rounded = nearest(tensor, grid, dtype or tensor.dtype)
        stem, chosen[name], values[name] = name.removesuffix("weight"), grid, rounded.values(torch.float32)
        stored |= {stem + suffix: part for suffix, part in zip(SUFFIXES, rounded.tensors(grid.bits), strict=True)}
    infos = [TensorInfo(name, CODES[str(t.dtype)[6:]], tuple(t.shape)) for name, t in stored.items()]
    config["quantization_config"] = quantization_config(chosen, infos, row)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return values


def as_floats(packed: Path, values: dict[str, torch.Tensor], out: Path) -> Path:
    """The same model with what :func:`pack_folder` gave as plain float32 tensors."""
    shutil.copytree(packed, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = read_config(packed)
    del config["quantization_config"]
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return out
