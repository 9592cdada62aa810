"""Integer grids on which weights are stored, in the packed form of compressed-tensors. No torch.

A weight [m, n] is q s with integers q of b bits, -2^(b-1) to 2^(b-1) - 1, and a scale s for each row, or for each group
of neighbouring inputs in a row. compressed-tensors calls this ``pack-quantized`` with symmetric integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svdconvert.tensors import DTYPES, TensorInfo

# Suffixes of the tensors that take the place of ``weight``: the integers, 32 bits to a word, the scales, the shape.
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
SUFFIXES = (PACKED, SCALE, SHAPE)


@dataclass(frozen=True, slots=True, order=True)
class Grid:
    """How the entries of a matrix are rounded.

    Attributes:
        bits: of an integer, 2 to 8.
        group: inputs of a row that share a scale; 0 for a scale per row.
    """

    bits: int
    group: int = 0

    @property
    def largest(self) -> int:
        """The largest integer; the smallest one is its negative minus 1."""
        return 2 ** (self.bits - 1) - 1

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether the groups divide the rows of a matrix [m, n]."""
        return not self.group or shape[1] % self.group == 0

    def scales(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a matrix [m, n]: [m, groups]."""
        return shape[0], shape[1] // self.group if self.group else 1

    def words(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the packed integers: every row begins with a new word, and entries may straddle words."""
        return shape[0], math.ceil(shape[1] * self.bits / 32)

    def tensors(self, weight: str, shape: tuple[int, int], scale: str) -> tuple[TensorInfo, ...]:
        """The tensors that take the place of a weight, in the order of :data:`SUFFIXES`.

        Args:
            weight: its name, which ends in ``weight``.
            shape: ``(out, in)``.
            scale: safetensors' code of the scales' type, that of the weight before.
        """
        stem = weight.removesuffix("weight")
        kinds = (("I32", self.words(shape)), (scale, self.scales(shape)), ("I64", (2,)))
        return tuple(TensorInfo(stem + name, *kind) for name, kind in zip(SUFFIXES, kinds, strict=True))

    def nbytes(self, shape: tuple[int, int], scale: str = "BF16") -> int:
        """Bytes of a matrix [m, n]: integers and scales, without its shape."""
        return 4 * math.prod(self.words(shape)) + DTYPES[scale][0] * math.prod(self.scales(shape))

    def scheme(self) -> dict[str, Any]:
        """``weights`` of a group in the ``quantization_config`` of config.json."""
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }

    @classmethod
    def of_scheme(cls, weights: Mapping[str, Any]) -> Grid:
        """The grid of a :meth:`scheme`, checked beforehand."""
        return cls(int(weights["num_bits"]), int(weights.get("group_size") or 0))

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f" in groups of {self.group}" if self.group else "")


def scale_of(weight: str) -> str:
    """Name of the tensor with the scales of a weight that is packed."""
    return weight.removesuffix("weight") + SCALE


def weights_of(names: Sequence[str]) -> list[str]:
    """Names of the weights that stored tensors stand for, each once, in their order."""
    return list(dict.fromkeys(_weight_of(name) for name in names))


def _weight_of(name: str) -> str:
    return next((f"{name.removesuffix(end)}weight" for end in SUFFIXES if name.endswith(f".{end}")), name)
