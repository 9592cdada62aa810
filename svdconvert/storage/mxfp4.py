"""Experts whose matrices files hold as MXFP4, read as the matrices that they stand for. No torch.

The format is that of the OCP Microscaling specification 1.0: 32 numbers of four bits (E2M1) have a power of two in
common (E8M0). gpt-oss is published in it, as two tensors of bytes for a stack of matrices: ``NAME_blocks``
[experts, out, in / 32, 16], whose bytes are two numbers, the lower four bits first, and ``NAME_scales``
[experts, out, in / 32]. Whatever reads a checkpoint finds a matrix for each expert in their place, in bfloat16, which
holds a number of four bits times a power of two exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.families.unsupported import quantisation_of
from svdconvert.storage.packed import Place
from svdconvert.tensors import Cut, TensorInfo
from svdconvert.words import size

if TYPE_CHECKING:
    from torch import Tensor

METHOD, CODE, DTYPE, GROUP = "mxfp4", "BF16", "bfloat16", 32
_BLOCKS, _SCALES = "_blocks", "_scales"
# What the four bits stand for.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127
# Fields of config.json that say how the files are, which what is read is not.
_FIELDS = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """A stack of matrices as the files hold it.

    Attributes:
        blocks: the numbers, two in a byte: [all rows, in / 32, 16].
        scales: powers of two: [all rows, in / 32].
    """

    blocks: TensorInfo
    scales: TensorInfo

    @property
    def place(self) -> Place:
        """That of the stack, which is that of its numbers."""
        return self.blocks.file, self.blocks.start

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows of all matrices, in)``."""
        return self.blocks.shape[0], self.blocks.shape[1] * GROUP

    @property
    def code(self) -> str:
        """Type of the matrices."""
        return CODE

    def values(self, rows: Callable[[TensorInfo], Tensor]) -> Tensor:
        """Some rows, [rows, in], bfloat16: the same, to the bit, as transformers makes of them.

        A scale of 255, which stands for no number, gives infinities, and NaN of 0.

        Args:
            rows: reads those of a tensor.
        """
        import torch

        # Both numbers of a byte in one look-up, as one integer of their 32 bits.
        numbers = torch.tensor(_VALUES, dtype=torch.bfloat16)
        pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=-1).view(torch.int32)[:, 0]
        powers = torch.pow(2.0, torch.arange(256) - _BIAS).bfloat16()
        scales = rows(self.scales)
        values = pairs.index_select(0, rows(self.blocks).flatten().int()).view(torch.bfloat16)
        values = values.view(*scales.shape, GROUP).mul_(powers[scales.int()][..., None])
        return values.flatten(1)


@dataclass(frozen=True)
class Read:
    """A checkpoint with such experts, as it is read.

    Attributes:
        tensors: all by name.
        stacks: what stands for the matrices among them.
        config: config.json of a model that is not quantised.
        note: for the user.
    """

    tensors: dict[str, TensorInfo]
    stacks: tuple[Mxfp4, ...]
    config: dict[str, Any]
    note: str | None = None


def read_mxfp4(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str, *, pickled: bool) -> Read:
    """A checkpoint as it is read; another one than those as it is.

    Args:
        tensors: as the files have them.
        config: its config.json.
        where: the model, for messages.
        pickled: whether the files are pickles.

    Raises:
        InputError: the tensors are not those of such a model.
    """
    row = ARCHITECTURES.get(str(config.get("model_type")))
    if row is None or row.experts is None or quantisation_of(config) != METHOD:
        return Read(dict(tensors), (), dict(config))
    if pickled:
        raise InputError(f"{where} holds MXFP4 weights in pickles; give the safetensors files")
    experts = row.experts
    stack = re.compile(rf"(.*\.){re.escape(experts.mixture_5)}\.experts\.({'|'.join(experts.stacks)})")
    found, stacks, used, stored = {}, [], set[str](), 0
    for name, info in tensors.items():
        path = name.removesuffix(_BLOCKS)
        if path == name or (match := stack.fullmatch(path)) is None:
            continue
        (part,) = experts.stacks[match[2]]
        packed = _stack(info, tensors.get(path + _SCALES), where)
        count, rows, columns = info.shape[0], info.shape[1], packed.shape[1]
        length = 2 * rows * columns
        for expert in range(count):
            own = f"{match[1]}{experts.mixture}.experts.{expert}.{part}.weight"
            cut = Cut(path, expert * length, length, count * length)
            found[own] = TensorInfo(own, CODE, (rows, columns), *packed.place, cut)
        stacks.append(packed)
        used |= {name, path + _SCALES}
        stored += info.nbytes + packed.scales.nbytes
    kept = {name: value for name, value in config.items() if name not in _FIELDS}
    if kept.get("torch_dtype") is None and kept.get("dtype") is None:
        kept["torch_dtype"] = DTYPE
    tensors = {name: info for name, info in tensors.items() if name not in used} | found
    return Read(tensors, tuple(stacks), kept, _note(where, sum(info.nbytes for info in found.values()), stored))


def _stack(blocks: TensorInfo, scales: TensorInfo | None, where: str) -> Mxfp4:
    if scales is None:
        raise InputError(f"{where} lacks {blocks.name.removesuffix(_BLOCKS)}{_SCALES}; fetch it again")
    if blocks.dtype != "U8" or scales.dtype != "U8" or blocks.shape != (*scales.shape, GROUP // 2):
        raise InputError(
            f"{blocks.name} of {where}, of shape {list(blocks.shape)} and type {blocks.dtype}, and {scales.name}, of "
            f"{list(scales.shape)} and {scales.dtype}, are not numbers and scales of MXFP4; fetch them again"
        )
    if len(scales.shape) != 3 or not blocks.size:
        raise InputError(
            f"{scales.name} of {where} has the shape {list(scales.shape)}, not three sizes; fetch it again"
        )
    rows = (scales.shape[0] * scales.shape[1], scales.shape[2])
    return Mxfp4(replace(blocks, shape=(*rows, GROUP // 2)), replace(scales, shape=rows))


def _note(where: str, read: int, stored: int) -> str | None:
    if not read:
        return None
    return (
        f"{where} holds its experts rounded to four bits (MXFP4); what is read, factored and compared with is those "
        f"rounded weights, multiplied out to bfloat16; sizes before are those of bfloat16, {size(read)} of experts, "
        f"not of the files, {size(stored)}"
    )
