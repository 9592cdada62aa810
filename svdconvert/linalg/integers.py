"""Matrices rounded to integer grids: scales, calibrated rounding, and the packing of compressed-tensors.

An entry is q s, q an integer of b bits from -2^(b-1) to 2^(b-1) - 1 and s the scale of its row or group. A scale is
rounded to the type that it is stored in before the integers are chosen, so that they make up for that.

The integers reach one step further down than up. A scale has the sign that brings a group's largest entry to the lower
end, so it may be negative; that spares a group an eighth of its step at 4 bits, and a quarter at 3. Of a few sizes of
the step the one of least squared error is taken: a smaller one cuts off the largest entries and resolves the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from svdconvert.grids import Grid
from svdconvert.linalg.precision import refuse_overflow
from svdconvert.linalg.rounding import BLOCK, upper_factor
from svdconvert.sentences import asked

# Steps that are tried, as shares of the one that reaches from 0 to a group's largest entry.
SHARES = tuple(1.12 * 0.94**i for i in range(14))

# What is added to the diagonal of a Gram matrix that has no Cholesky factor, relative to it; the first that is enough.
RIDGES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)


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
    groups = weight.to(_working(weight)).unflatten(1, (grid.scales(weight.shape)[1], -1))  # type: ignore[arg-type]
    counts = None if importance is None else importance.to(groups).view(groups.shape[1:])
    scales = scales_of(groups, grid, scale_dtype, counts)
    return Rounded(codes_of(groups, scales.to(groups.dtype)[..., None], grid).flatten(1).to(torch.int8), scales)


class Feedback:
    """Calibrated rounding in one metric: what all matrices that read the same inputs, and all grids, have in common.

    Entries are rounded one after another in the order of the inputs, and the later ones move to where they best make
    up for the error (GPTQ, Frantar et al., arXiv:2210.17323, algorithm 1, with the Cholesky factor of H^-1). The scale
    of a group is chosen when its first entry is reached, for the values then wanted. With H = J J^T, J upper
    triangular, an error of entry j costs J_jj^2 after that; the scales are chosen by it.
    """

    def __init__(self, gram: Tensor) -> None:
        """Prepare.

        Args:
            gram: H, second moments of the inputs, [n, n], symmetric, >= 0. Where it is singular, the least of
                :data:`RIDGES` that helps is added to its diagonal.
        """
        exact = gram.double()
        self._counts, self._upper = exact.diagonal(), upper_factor(exact, RIDGES)
        if self._upper is not None:
            identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
            inverse = torch.linalg.solve_triangular(self._upper, identity, upper=True)
            self._passed_on = inverse.mul_(self._upper.diagonal()[:, None])
            self._upper *= (self._counts > 0)[:, None]  # what nothing depends on costs nothing
            self._cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    @property
    def works(self) -> bool:
        """Whether the metric has a triangular factor; else all is rounded to the nearest."""
        return self._upper is not None

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(J, row i: by how much an error in column i moves the optimum of the later ones)``, [n, n] in a type."""
        assert self._upper is not None
        if dtype not in self._cast:
            self._cast[dtype] = self._upper.to(dtype), self._passed_on.to(dtype)
        return self._cast[dtype]

    def round(self, weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Rounded:
        """Round rows w such that (w' - w) H (w' - w)^T is small; row by row never worse by it than :func:`nearest`.

        Computed in float64 where the weight is, else in float32.

        Args:
            weight: [m, n], any floating type.
            grid: its groups divide n.
            scale_dtype: type that the scales are stored in.

        Raises:
            InputError: see :func:`nearest`.
        """
        exact = weight.to(_working(weight))
        plain = nearest(exact, grid, scale_dtype, self._counts)
        if not self.works:
            return plain
        upper, passed_on = self.factors(exact.dtype)
        rounded = _sequential(exact, grid, passed_on, upper.diagonal().square(), scale_dtype)

        def cost(candidate: Rounded) -> Tensor:
            return ((candidate.values(exact.dtype) - exact) @ upper).square_().sum(dim=1, keepdim=True)

        better = cost(rounded) < cost(plain)  # false for NaN
        return Rounded(
            torch.where(better, rounded.codes, plain.codes), torch.where(better, rounded.scales, plain.scales)
        )


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


def _working(weight: Tensor) -> torch.dtype:
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


def _sequential(weight: Tensor, grid: Grid, passed_on: Tensor, importance: Tensor, scale_dtype: torch.dtype) -> Rounded:
    """Entries rounded one after another, each to what the errors before it ask for. Columns are rows here."""
    (m, n), group = weight.shape, grid.group or weight.shape[1]
    wanted = weight.T.contiguous()
    errors = torch.empty_like(wanted)
    codes = torch.empty(n, m, dtype=torch.int8, device=weight.device)
    scales = torch.empty(*grid.scales((m, n)), dtype=scale_dtype, device=weight.device)
    for start, stop in pairwise(sorted({*range(0, n, BLOCK), *range(0, n, group), n})):
        if start % group == 0:
            part = slice(start, start + group)
            chosen = scales_of(wanted[part].T.contiguous(), grid, scale_dtype, importance[part])
            scales[:, start // group] = chosen
            step = chosen.to(wanted.dtype)
        for j in range(start, stop):
            code = codes_of(wanted[j], step, grid)
            codes[j] = code
            errors[j] = code * step - wanted[j]
            wanted[j + 1 : stop].addr_(passed_on[j, j + 1 : stop], errors[j])
        wanted[stop:].addmm_(passed_on[start:stop, stop:].T, errors[start:stop])
    return Rounded(codes.T.contiguous(), scales)
