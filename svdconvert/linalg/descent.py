"""Coordinate descent on a rounded matrix: single integers and scales moved to where they lose least.

Feedback rounds every entry once, with those before it fixed and those after it free. Once all are fixed, an entry may
have a better place on its grid, and so may a scale, which was chosen before any entry was. Each is moved to its optimum
in turn, integers column by column and then scales group by group, so no move raises the loss (cyclic descent, as in
QuantEase, Behdin et al., arXiv:2309.01885; scales by their normal equation).
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.grids import Grid
from svdconvert.linalg.integers import Rounded, codes_of
from svdconvert.linalg.rounding import BLOCK


def descend(weight: Tensor, rounded: Rounded, gram: Tensor, grid: Grid, sweeps: int) -> Rounded:
    """Lower (w' - w) H (w' - w)^T of every row.

    The moves are computed in the weight's type, so beside inputs that outweigh all others by far they may be a little
    off: compare what comes out with what went in.

    Args:
        weight: w, [m, n], float32 or float64.
        rounded: w', on the grid.
        gram: H, [n, n], symmetric, >= 0.
        grid: of the integers.
        sweeps: times that every integer and every scale is visited.

    Returns:
        Integers and scales in the types of ``rounded``.
    """
    gram = gram.to(weight.dtype)
    counts = gram.diagonal().clamp_min(torch.finfo(weight.dtype).tiny)  # of an input that is always 0, nothing moves
    # Columns are rows here.
    codes, wanted = rounded.codes.T.to(weight.dtype).contiguous(), weight.T.contiguous()
    scales = rounded.scales.T.to(weight.dtype).contiguous()
    group, dtype = grid.group or len(codes), rounded.scales.dtype
    slope = gram @ (codes * scales.repeat_interleave(group, dim=0) - wanted)  # half the gradient, [n, m]
    for _ in range(sweeps):
        _move_codes(codes, scales, slope, gram, counts, grid, group)
        for index, scale in enumerate(scales):
            _move_scale(codes[index * group : (index + 1) * group], scale, slope, gram, index * group, dtype)
    return Rounded(codes.T.to(torch.int8).contiguous(), scales.T.to(dtype).contiguous())


def _move_codes(
    codes: Tensor, scales: Tensor, slope: Tensor, gram: Tensor, counts: Tensor, grid: Grid, group: int
) -> None:
    """Visit every integer once; all is changed in place."""
    n = len(codes)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        near, moves = slope[start:stop].clone(), torch.empty_like(slope[start:stop])
        for j in range(start, stop):
            step, at = scales[j // group], j - start
            code = codes_of(codes[j] * step - near[at] / counts[j], step, grid)
            moves[at] = (code - codes[j]) * step
            codes[j] = code
            near.addr_(gram[start:stop, j], moves[at])
        slope.addmm_(gram[:, start:stop], moves)


def _move_scale(codes: Tensor, scale: Tensor, slope: Tensor, gram: Tensor, start: int, dtype: torch.dtype) -> None:
    """Move the scale of a group in every row, [m], in place; ``codes`` are those of the group."""
    part = slice(start, start + len(codes))
    curvature = ((gram[part, part] @ codes) * codes).sum(dim=0)
    best = scale - (slope[part] * codes).sum(dim=0) / curvature.clamp_min(torch.finfo(scale.dtype).tiny)
    best = best.to(dtype).to(scale.dtype)
    best = torch.where((curvature > 0) & torch.isfinite(best) & (best != 0), best, scale)
    slope.addmm_(gram[:, part], codes * (best - scale))
    scale.copy_(best)
