"""Rounding with feedback along inputs and outputs: integers for which tr(L E R E^T) is small.

Feedback along the inputs (``linalg/integers.py``) takes each row by itself, as if L were diagonal. But errors of other
outputs can make up for one another as well. The loss is that of one row of m n entries in the metric L (x) R, whose
triangular factor is that of L times that of R. So feedback goes both ways: once rows are rounded with all that the
inputs allow, the later rows move by -L_rr^-1 L_rb times their errors, whatever R is. An error of entry (i, j) then
costs I_ii^2 J_jj^2 for L = I I^T and R = J J^T, in place of L_ii J_jj^2.

Rows are taken in blocks, whose rows do not see each other; that costs little, and a block can be at one chunk of
columns while the block before it is at the next. All such pairs of block and chunk are rounded together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.grids import Grid
from svdconvert.linalg.integers import Feedback, Rounded, codes_of, scales_of

# Columns of a chunk, at most, where groups allow it.
CHUNK = 32

# Blocks that the rows are cut into, and the fewest rows of one.
BLOCKS, FEWEST_ROWS = 24, 8


@dataclass
class _State:
    """A matrix under way, [blocks, columns, rows of a block] each but the scales.

    Attributes:
        aim: what the blocks before leave of the wish, without a block's own errors.
        wanted: the same with them.
        codes: the integers.
        scales: [blocks, groups, rows of a block].
    """

    aim: Tensor
    wanted: Tensor
    codes: Tensor
    scales: Tensor


class BothSides:
    """Feedback in one pair of metrics."""

    def __init__(self, left: Feedback, right: Feedback) -> None:
        """Prepare.

        Args:
            left, right: in the metrics on the outputs and on the inputs, [m, m] and [n, n].
        """
        self._left, self._right = left, right

    @property
    def works(self) -> bool:
        """Whether both metrics have a triangular factor."""
        return self._left.works and self._right.works

    def round(self, weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Rounded:
        """A matrix, [m, n], on a grid whose groups divide n; computed in float64 where the weight is, else in float32.

        Raises:
            InputError: see :func:`svdconvert.linalg.integers.nearest`.
        """
        exact = weight if weight.dtype == torch.float64 else weight.float()
        m, n = exact.shape
        rows, columns = max(math.ceil(m / BLOCKS), min(FEWEST_ROWS, m)), _chunk(grid.group)
        blocks, chunks = math.ceil(m / rows), math.ceil(n / columns)
        more = chunks * columns - n
        aim = torch.nn.functional.pad(exact, (0, more, 0, blocks * rows - m))
        aim = aim.view(blocks, rows, -1).transpose(1, 2).contiguous()
        counts = max(grid.scales((m, n))[1], chunks * columns // grid.group if grid.group else 1)
        state = _State(aim, aim.clone(), torch.zeros_like(aim, dtype=torch.int8), aim.new_zeros(blocks, counts, rows))
        upper, passed_on = self._right.factors(exact.dtype)
        wave = _Wave(
            state,
            grid,
            scale_dtype,
            columns,
            torch.nn.functional.pad(passed_on, (0, more, 0, more)),
            torch.nn.functional.pad(upper.diagonal().square(), (0, more)),
            self._between_blocks(rows, exact.dtype),
        )
        for step in range(blocks + chunks - 1):
            wave.round([(block, step - block) for block in range(blocks) if 0 <= step - block < chunks])
        codes = state.codes.transpose(1, 2).reshape(blocks * rows, -1)[:m, :n]
        scales = state.scales.transpose(1, 2).reshape(blocks * rows, -1)[:m, : grid.scales((m, n))[1]]
        return Rounded(codes.contiguous(), scales.to(scale_dtype).contiguous())

    def _between_blocks(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Row i: by how much an error in output i moves the optimum of the blocks after its own; padded."""
        passed_on = self._left.factors(torch.float64)[1]
        found = torch.zeros_like(passed_on)
        for start in range(0, len(passed_on), rows):
            part, after = slice(start, start + rows), slice(start + rows, None)
            found[part, after] = torch.linalg.solve_triangular(
                passed_on[part, part], passed_on[part, after], upper=True, unitriangular=True
            )
        more = -len(passed_on) % rows
        return torch.nn.functional.pad(found.to(dtype), (0, more, 0, more))


@dataclass
class _Wave:
    """What is rounded together.

    Attributes:
        state: of the matrix; it is changed.
        grid, scale_dtype: what to round to.
        columns: of a chunk.
        inputs: row j: by how much an error in column j moves the optimum of the later ones, [columns, columns].
        importance: what an error of a column costs after that, [columns].
        outputs: the same as ``inputs`` between blocks of rows, [rows, rows].
    """

    state: _State
    grid: Grid
    scale_dtype: torch.dtype
    columns: int
    inputs: Tensor
    importance: Tensor
    outputs: Tensor

    def round(self, pairs: list[tuple[int, int]]) -> None:
        """Round chunks of blocks, no two of one block or one chunk, and hand their errors on."""
        state, width, group = self.state, self.columns, self.grid.group
        parts = [slice(chunk * width, (chunk + 1) * width) for _, chunk in pairs]
        current = torch.stack([state.wanted[block, part] for (block, _), part in zip(pairs, parts, strict=True)])
        within = torch.stack([self.inputs[part, part] for part in parts])
        importance = torch.stack([self.importance[part] for part in parts])
        errors, codes, values = (torch.empty_like(current) for _ in range(3))
        if not 0 < group <= width:
            step = self._scales_of_groups(pairs)
        for j in range(width):
            if 0 < group <= width and j % group == 0:
                part = slice(j, j + group)
                step = self._scales_of(pairs, current[:, part], importance[:, part], j)
            codes[:, j] = codes_of(current[:, j], step, self.grid)
            values[:, j] = codes[:, j] * step
            errors[:, j] = values[:, j] - current[:, j]
            current[:, j + 1 :].addcmul_(within[:, j, j + 1 :, None], errors[:, None, j])
        for (block, _), part, code, value, error in zip(pairs, parts, codes, values, errors, strict=True):
            state.codes[block, part] = code.to(torch.int8)
            state.wanted[block, part.stop :].addmm_(self.inputs[part, part.stop :].T, error)
            self._hand_down(block, part, value - state.aim[block, part])

    def _scales_of_groups(self, pairs: list[tuple[int, int]]) -> Tensor:
        """Scales of the groups that chunks lie in, chosen where they begin: [pairs, rows]."""
        width, group = self.columns, self.grid.group or self.state.wanted.shape[1]
        first = [(block, chunk) for block, chunk in pairs if chunk * width % group == 0]
        if first:
            parts = [slice(chunk * width, chunk * width + group) for _, chunk in first]
            values = [self.state.wanted[block, part] for (block, _), part in zip(first, parts, strict=True)]
            importance = torch.stack([self.importance[part] for part in parts])
            self._scales_of(first, torch.stack(values), importance, 0)
        return torch.stack([self.state.scales[block, chunk * width // group] for block, chunk in pairs])

    def _scales_of(self, pairs: list[tuple[int, int]], values: Tensor, importance: Tensor, place: int) -> Tensor:
        """Scales of groups that begin at a place in their chunks, whose values are [pairs, group, rows]."""
        group = self.grid.group or self.state.wanted.shape[1]
        values = values.transpose(1, 2).contiguous()
        found = scales_of(values, self.grid, self.scale_dtype, importance[:, None]).to(values.dtype)
        for (block, chunk), scales in zip(pairs, found, strict=True):
            self.state.scales[block, (chunk * self.columns + place) // group] = scales
        return found

    def _hand_down(self, block: int, part: slice, error: Tensor) -> None:
        """Move the later blocks in a chunk of columns by the error of a block there, [columns, rows]."""
        rows, later = error.shape[1], len(self.state.aim) - block - 1
        if later:
            own = self.outputs[block * rows : (block + 1) * rows, (block + 1) * rows :]
            moved = (error @ own).view(-1, later, rows).transpose(0, 1)
            self.state.aim[block + 1 :, part] += moved
            self.state.wanted[block + 1 :, part] += moved


def _chunk(group: int) -> int:
    """Columns of a chunk: whole groups, or a whole part of one."""
    if not group:
        return CHUNK
    if group < CHUNK:
        return CHUNK // group * group
    return next(size for size in range(CHUNK, 0, -1) if group % size == 0)
