"""Sizes of weights on integer grids."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from svdconvert.grids import Grid


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 32, 64])
def test_bytes_are_those_of_the_tensors(bits: int, group: int) -> None:
    grid, shape = Grid(bits, group), (24, 192)
    packed, scale, outer = grid.tensors("layers.0.down.weight", shape, "F16")
    assert packed.nbytes + scale.nbytes == grid.nbytes(shape, "F16")
    assert packed.nbytes == Fraction(24 * 192 * bits, 8)  # 192 inputs fill whole words
    assert scale.size == 24 * (192 // group if group else 1)
    assert outer.shape == (2,)
    assert packed.name == "layers.0.down.weight_packed"
    assert Grid.of_scheme(grid.scheme()) == grid


def test_every_row_begins_with_a_word_of_its_own() -> None:
    assert Grid(6).words((5, 50)) == (5, math.ceil(300 / 32))
    assert not Grid(4, 32).fits((5, 50))
    assert Grid(4).fits((5, 50))
