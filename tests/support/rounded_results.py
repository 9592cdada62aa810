"""What a result with weights of few bits stores, and what that loses, by arithmetic of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from svdconvert.jobs.record import read_record

SHRINKAGE = 0.2


def integers(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The integers of packed rows, by their binary digits: lowest first, 2^(b-1) added to each."""
    digits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    places = digits.reshape(len(words), columns, bits).astype(np.int64)
    return (places << np.arange(bits)).sum(axis=2) - 2 ** (bits - 1)


def values(tensors: Mapping[str, torch.Tensor], stem: str, bits: int) -> np.ndarray:
    """A weight [m, n] float64, packed or not."""
    if f"{stem}.weight" in tensors:
        return tensors[f"{stem}.weight"].double().numpy()
    rows, columns = tensors[f"{stem}.weight_shape"].tolist()
    codes = integers(tensors[f"{stem}.weight_packed"].numpy(), bits, columns)
    scales = tensors[f"{stem}.weight_scale"].double().numpy()
    return codes.reshape(rows, columns) * np.repeat(scales, columns // scales.shape[1], axis=1)


def stored(result: Path, module: str) -> np.ndarray:
    """The matrix that a result has in the place of a module's, [out, in] float64."""
    record, tensors = read_record(result).results, load_file(result / "model.safetensors")
    stem = f"gpt_neox.{module}"
    if module in record["matrices"]:
        bits = record["matrices"][module].get("bits", [16, 16])
        return values(tensors, f"{stem}.up", bits[1]) @ values(tensors, f"{stem}.down", bits[0])
    return values(tensors, stem, record["rounded"].get(module, {"bits": [16]})["bits"][0])


def loss(error: np.ndarray, statistics: Any) -> float:
    """tr(L E R E^T) / 2 in the shrunk second moments."""

    def metric(gram: torch.Tensor) -> np.ndarray:
        whole = gram.double().numpy()
        return (1 - SHRINKAGE) * whole + SHRINKAGE * np.diag(np.diag(whole))

    left, right = metric(statistics.output_gram), metric(statistics.input_gram)
    return float(np.trace(left @ error @ right @ error.T)) / 2
