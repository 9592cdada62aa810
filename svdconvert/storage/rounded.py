"""Weights on integer grids, read as integers and scales rather than multiplied out."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.integers import Rounded, unpack
from svdconvert.storage.reader import as_bytes, torch_dtype
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_data import PlainData
from svdconvert.tensors import TensorInfo


def read_rounded(source: Source, weight: str) -> Rounded:
    """A packed weight.

    Args:
        source: the checkpoint.
        weight: its name in ``source.packed``.

    Raises:
        JobError: a file cannot be read.
    """
    packed = source.packed[weight]
    words, scales = (_read(source, info) for info in (packed.words, packed.scale))
    return Rounded(unpack(words, packed.grid.bits, packed.shape[1]), scales)


def _read(source: Source, info: TensorInfo) -> Tensor:
    """A tensor as the file has it."""
    data, whole = PlainData(source.path(info.file), info.file), torch.empty(info.nbytes, dtype=torch.uint8)
    try:
        data.fill(info, as_bytes(whole), 0)
    finally:
        data.close()
    return whole.view(torch_dtype(info.dtype)).view(info.shape)
