"""Weights that are stored as packed integers, read as the matrices that they stand for. No torch.

A checkpoint has three tensors for such a weight (:mod:`svdconvert.grids`). Whatever reads a checkpoint finds one in
their place, in float32: integers times scales of 16 bits need up to 19 bits of mantissa, so no shorter type holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svdconvert.errors import InputError
from svdconvert.grids import PACKED, SCALE, SHAPE, SUFFIXES, Grid
from svdconvert.storage.packed_config import FIELD, is_packed, packed_grids
from svdconvert.storage.whole import Whole
from svdconvert.tensors import FLOATS, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# Where the data of a tensor lies: its file, and its position in it.
Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight on a grid, as the files hold it.

    Attributes:
        grid: its entries are on.
        words: the packed integers.
        scale: the scales.
        shape: ``(out, in)`` of the weight.
    """

    grid: Grid
    words: TensorInfo
    scale: TensorInfo
    shape: tuple[int, int]

    @property
    def place(self) -> Place:
        """That of the weight, which is that of its integers."""
        return self.words.file, self.words.start

    @property
    def code(self) -> str:
        """Type of the weight as it is read."""
        return "F32"

    def values(self, rows: Callable[[TensorInfo], Tensor]) -> Tensor:
        """Some rows of the weight, [rows, in], float32.

        Args:
            rows: reads those of a tensor.
        """
        import torch

        from svdconvert.linalg.integers import Rounded, unpack

        codes = unpack(rows(self.words), self.grid.bits, self.shape[1])
        return Rounded(codes, rows(self.scale)).values(torch.float32)

    def info(self, name: str) -> TensorInfo:
        """The weight as it is read."""
        return TensorInfo(name, self.code, self.shape, *self.place)


def unpacked(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    where: str,
    read_shape: Callable[[TensorInfo], tuple[int, int]],
    whole: Whole | None = None,
) -> tuple[dict[str, TensorInfo], dict[str, Packed]]:
    """The tensors of a checkpoint, with those that stand for a weight replaced by that weight.

    Args:
        tensors: as the files have them.
        config: its config.json.
        where: the model, for messages.
        read_shape: reads the values of a tensor of two int64.
        whole: the model that sees of which the tensors are the language model, if it is one.

    Returns:
        ``(tensors, packed)``: all by name, and what stands for the weights among them that are packed.

    Raises:
        InputError: the weights are packed in another form, or tensors and config.json do not fit.
    """
    names = [name.removesuffix(PACKED) for name in tensors if name.endswith(f".{PACKED}")]
    if not names and not is_packed(config):
        return dict(tensors), {}
    if not is_packed(config):
        raise InputError(f"{where} holds packed weights, but its config.json has no {FIELD}; convert the model again")
    grids = packed_grids(config, [f"{stem}weight" for stem in names], where, whole)
    packed = {f"{stem}weight": _packed(stem, grids[f"{stem}weight"], tensors, where, read_shape) for stem in names}
    parts = {stem + suffix for stem in names for suffix in SUFFIXES}
    # transformers saves an unpacked model so, whose weights are not on their grids any more: what is left of those
    plain = {name.removesuffix(SCALE) for name in tensors if name.endswith(f".{SCALE}")}
    parts |= {stem + suffix for stem in plain if f"{stem}weight" in tensors for suffix in (SCALE, SHAPE)}
    found = {}
    for name, info in tensors.items():
        if name.endswith(f".{PACKED}"):
            weight = name.removesuffix(PACKED) + "weight"
            if weight in tensors:
                raise InputError(f"{where} has both {weight} and {name}; convert the model again")
            found[weight] = packed[weight].info(weight)
        elif name not in parts:
            found[name] = info
    return found, packed


def _packed(
    stem: str,
    grid: Grid,
    tensors: Mapping[str, TensorInfo],
    where: str,
    read_shape: Callable[[TensorInfo], tuple[int, int]],
) -> Packed:
    missing = [stem + suffix for suffix in SUFFIXES if stem + suffix not in tensors]
    if missing:
        raise InputError(f"{where} lacks {missing[0]}; fetch it again, or convert the model again")
    words, scale, shape = (tensors[stem + suffix] for suffix in (PACKED, SCALE, SHAPE))
    if words.dtype != "I32" or len(words.shape) != 2 or scale.dtype not in FLOATS or shape.dtype != "I64":
        raise InputError(f"the tensors {stem}* of {where} are not of the types of packed weights; fetch it again")
    if shape.shape != (2,):
        raise InputError(f"{shape.name} of {where} has the shape {list(shape.shape)}, not [2]; fetch it again")
    found = read_shape(shape)
    if min(found) < 1 or not grid.fits(found) or words.shape != grid.words(found) or scale.shape != grid.scales(found):
        old = (found[0], -(-found[1] // (32 // grid.bits)))
        raise InputError(
            f"{words.name} of {where} was packed by compressed-tensors before 0.18, whose words of {grid.bits} bits "
            "are others; save the model with a newer one"
            if words.shape == old and words.shape != grid.words(found)
            else f"{stem}* of {where} do not make a matrix of shape {list(found)} at {grid}; fetch it again, or "
            "convert the model again"
        )
    return Packed(grid, words, scale, found)
