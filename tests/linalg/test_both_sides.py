"""Feedback along inputs and outputs against GPTQ of the whole matrix as one row, in the metric L (x) R."""

from __future__ import annotations

import pytest
import torch
from support.metrics import normal

from svdconvert.grids import Grid
from svdconvert.linalg import both_sides
from svdconvert.linalg.both_sides import BothSides
from svdconvert.linalg.integers import Feedback, Rounded, nearest

SCALE = torch.bfloat16


def correlated(n: int, seed: int) -> torch.Tensor:
    inputs = normal(3 * n, n, seed=seed) * normal(1, n, seed=seed + 1).exp() + normal(3 * n, 1, seed=seed + 2)
    return inputs.T @ inputs / len(inputs)


def loss(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rounded: Rounded) -> float:
    error = rounded.values(torch.float64) - weight
    return float((left @ error @ right * error).sum())


def one_row(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Optimal brain quantisation of all m n entries, row by row, with scales chosen as their groups are reached.

    What is left of the inverse of L (x) R when the entries before are fixed is worked out anew for every entry.
    """
    (m, n), group = weight.shape, grid.group or weight.shape[1]
    whole, wanted, values = torch.kron(left, right), weight.flatten().clone(), []
    own = torch.stack([1 / torch.linalg.inv(right[j:, j:])[0, 0] for j in range(n)])
    for place in range(m * n):
        j = place % n
        if j % group == 0:
            entries = wanted[None, place : place + group]
            scale = nearest(entries, Grid(grid.bits), SCALE, own[j : j + group]).scales.double()
        code = (wanted[place] / scale[0, 0]).round().clamp(-grid.largest - 1, grid.largest)
        values.append(code * scale[0, 0])
        error = values[-1] - wanted[place]
        wanted[place + 1 :] -= error * torch.linalg.solve(whole[place + 1 :, place + 1 :], whole[place + 1 :, place])
    return torch.stack(values).view(m, n)


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(3, 12), Grid(6, 6), Grid(2, 3)], ids=str)
def test_it_is_gptq_of_the_whole_matrix(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both_sides, "FEWEST_ROWS", 1)
    monkeypatch.setattr(both_sides, "CHUNK", 12)
    weight, left, right = normal(7, 12), correlated(7, 1), correlated(12, 4)
    found = BothSides(Feedback(left), Feedback(right)).round(weight, grid, SCALE)
    assert torch.equal(found.values(torch.float64), one_row(weight, left, right, grid))


@pytest.mark.parametrize("shape", [(64, 96), (100, 75), (200, 40), (3, 96), (1, 30)], ids=str)
@pytest.mark.parametrize("group", [0, "third", 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_less_than_along_the_inputs_alone(shape: tuple[int, int], group: int | str, dtype: torch.dtype) -> None:
    (m, n), bits = shape, 4
    grid = Grid(bits, n // 3 if group == "third" else int(group))
    if not grid.fits(shape):
        grid = Grid(bits, n // 4)
    weight, left, right = normal(m, n).to(dtype), correlated(m, 1), correlated(n, 4)
    outputs, inputs = Feedback(left), Feedback(right)
    found, plain = BothSides(outputs, inputs).round(weight, grid, SCALE), inputs.round(weight, grid, SCALE)
    assert found.codes.shape == shape
    assert tuple(found.scales.shape) == grid.scales(shape)
    assert found.scales.dtype == SCALE
    assert bool((found.scales != 0).all())
    if m > 60:
        # What an error costs with feedback along the outputs, against what it costs without, and a little more for
        # rows of one block, which do not see each other.
        share = outputs.factors(torch.float64)[0].diagonal().square().mean() / left.diagonal().mean()
        assert loss(weight.double(), left, right, found) < (0.3 + 0.7 * share) * loss(
            weight.double(), left, right, plain
        )


def test_an_output_that_nothing_depends_on() -> None:
    weight, left, right = normal(20, 32), correlated(20, 1), correlated(32, 4)
    left[3], left[:, 3] = 0, 0
    right[5], right[:, 5] = 0, 0
    found = BothSides(Feedback(left), Feedback(right)).round(weight, Grid(4, 16), SCALE)
    assert bool(torch.isfinite(found.values(torch.float64)).all())
    kept = [i for i in range(20) if i != 3]
    there = Feedback(right).round(weight, Grid(4, 16), SCALE)
    assert loss(weight, left, right, found) < loss(weight, left, right, there)
    # Nor does it change the others.
    alone = BothSides(Feedback(left[kept][:, kept]), Feedback(right)).round(weight[kept], Grid(4, 16), SCALE)
    assert loss(weight, left, right, found) == pytest.approx(
        loss(weight[kept], left[kept][:, kept], right, alone), rel=0.2
    )
