"""Matrices rounded to integer grids: scales, nearest values, and the packing of compressed-tensors.

An entry is q s, q an integer of b bits from -2^(b-1) to 2^(b-1) - 1 and s the scale of its row or group. A scale is
rounded to the type that it is stored in before the integers are chosen, so that they make up for that.

The integers reach one step further down than up. A scale has the sign that brings a group's largest entry to the lower
end, so it may be negative; that spares a group an eighth of its step at 4 bits, and a quarter at 3. Of a few sizes of
the step the one of least squared error is taken: a smaller one cuts off the largest entries and resolves the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.grids import Grid
from svdconvert.linalg.precision import refuse_overflow
from svdconvert.sentences import asked

# Steps that are tried, as shares of the one that reaches from 0 to a group's largest entry.
SHARES = tuple(1.12 * 0.94**i for i in range(14))


@dataclass(frozen=True)
class Rounded:
    """A matrix on an integer grid.

    Attributes:
        codes: the integers, [m, n] int8.
        scales: [m, groups], in the type that they are stored in; any sign.
    """

    codes: Tensor
    scales: Tensor

    def values(self, dtype: torch.dtype) -> Tensor:
        """[m, n]: integers times scales, computed in ``dtype``; exact in float32 for scales of 16 bits."""
        return (
            self.codes.to(dtype).unflatten(1, (self.scales.shape[1], -1)) * self.scales.to(dtype)[..., None]
        ).flatten(1)

    def tensors(self, bits: int) -> list[Tensor]:
        """What is stored, in the order of :data:`svdconvert.grids.SUFFIXES`."""
        return [pack(self.codes, bits), self.scales.contiguous(), torch.tensor(self.codes.shape)]


def nearest(weight: Tensor, grid: Grid, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Rounded:
    """Every entry to the nearest value of its group's grid; the scales are those of least squared error.

    Never worse, group by group and by that measure, than with the scales of largest entry / (2^(b-1) - 1).

    Args:
        weight: [m, n], any floating type.
        grid: its groups divide n.
        scale_dtype: type that the scales are stored in.
        importance: what a squared error of each input counts, [n], >= 0; None for all alike.

    Raises:
        InputError: an entry is not finite, or so large that the scale is not finite in its type.
    """
    groups = weight.to(working(weight)).unflatten(1, (grid.scales(weight.shape)[1], -1))  # type: ignore[arg-type]
    counts = None if importance is None else importance.to(groups).view(groups.shape[1:])
    scales = scales_of(groups, grid, scale_dtype, counts)
    return Rounded(codes_of(groups, scales.to(groups.dtype)[..., None], grid).flatten(1).to(torch.int8), scales)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers as compressed-tensors stores them from 0.18 on, each plus 2^(b-1), lowest bits first.

    A row begins with a new word, and entries may straddle words. Up to 0.16 none did: words of 3, 5, 6 and 7 bits are
    others there.

    Args:
        codes: [m, n] int8.
        bits: 2 to 8.

    Returns:
        [m, ceil(n bits / 32)] int32.
    """
    rows, columns = codes.shape
    count = math.ceil(columns / 32)
    entries = torch.nn.functional.pad(codes.int() + 2 ** (bits - 1), (0, 32 * count - columns)).view(rows, count, 32)
    words = entries.new_zeros(rows, count, bits)
    for place in range(32):
        word, shift = divmod(bits * place, 32)
        words[..., word] |= entries[..., place] << shift
        if shift + bits > 32:
            words[..., word + 1] |= entries[..., place] >> (32 - shift)
    return words.view(rows, count * bits)[:, : math.ceil(columns * bits / 32)].contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The reverse of :func:`pack`: [m, columns] int8."""
    rows, count = words.shape[0], math.ceil(columns / 32)
    whole = torch.nn.functional.pad(words, (0, count * bits - words.shape[1])).view(rows, count, bits)
    entries = whole.new_empty(rows, count, 32)
    for place in range(32):
        word, shift = divmod(bits * place, 32)
        entry = (whole[..., word] >> shift) & (2 ** min(bits, 32 - shift) - 1)  # the shift repeats the sign
        if shift + bits > 32:
            entry = entry | (whole[..., word + 1] & (2 ** (shift + bits - 32) - 1)) << (32 - shift)
        entries[..., place] = entry
    return (entries.view(rows, count * 32)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)


def working(weight: Tensor) -> torch.dtype:
    """The type that a matrix is rounded in."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def codes_of(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The nearest integers, in the values' type."""
    return (values / scales).round_().clamp_(-grid.largest - 1, grid.largest)


def scales_of(groups: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None) -> Tensor:
    """Scales of least squared error.

    Args:
        groups: [m, groups, entries], or [m, entries] of one group.
        grid: of the integers.
        dtype: type that the scales are stored in.
        importance: of the entries, [groups, entries] or [entries].

    Returns:
        [m, groups] or [m] in ``dtype``; none is zero.
    """
    place = groups.abs().argmax(dim=-1, keepdim=True)
    peak = groups.gather(-1, place).squeeze(-1)

    def stored(scales: Tensor) -> Tensor:
        rounded = scales.to(dtype)
        return torch.where(rounded == 0, 1, rounded)  # zeros, and what the type cannot tell from them

    def loss(scales: Tensor) -> Tensor:
        step = scales.to(groups.dtype)[..., None]
        error = (codes_of(groups, step, grid) * step).sub_(groups).square_()
        return (error if importance is None else error.mul_(importance)).sum(dim=-1)

    chosen = stored(peak.abs() / grid.largest)
    refuse_overflow(chosen, "a scale of it", f"choose {asked('dtype', 'bfloat16')} or float32")
    least = loss(chosen)
    for share in SHARES:
        scales = stored(peak * (-share / (grid.largest + 1)))
        found = loss(scales)
        better = found < least  # false for NaN
        chosen, least = torch.where(better, scales, chosen), torch.where(better, found, least)
    return chosen
