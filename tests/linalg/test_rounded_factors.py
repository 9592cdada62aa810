"""Matrices and products on integer grids: losses written out in float64, and simpler ways to round the same."""

from __future__ import annotations

import pytest
import torch
from support.metrics import dense, loss, metric, normal

from svdconvert.grids import Grid
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.integers import nearest
from svdconvert.linalg.pivot import fitted
from svdconvert.linalg.rounded_factors import MatrixRounding, RoundedMatrix
from svdconvert.linalg.rounding import equalized

SHAPES = [(96, 64), (64, 96)]
RANK = 32
PAIRS = [("matrix", "matrix"), ("vector", "matrix"), ("matrix", "outliers"), ("identity", "vector"),
         ("matrix", "identity"), ("matrix", "singular")]  # fmt: skip
SCALE = torch.bfloat16


def prepared(shape: tuple[int, int], kinds: tuple[str, str]) -> tuple[torch.Tensor, ...]:
    """A matrix with a falling spectrum, its metrics as they are and written out, and its exact factors."""
    m, n = shape
    decay = torch.linspace(0, -3, min(m, n), dtype=torch.float64).exp()
    weight = (normal(m, min(m, n), seed=5) * decay) @ normal(min(m, n), n, seed=6)
    left, right = metric(kinds[0], m, 1), metric(kinds[1], n, 2)
    factors = factorize(weight, RANK, torch.float64, left=left, right=right)
    return weight, left, right, dense(left, m), dense(right, n), factors.up, factors.down  # type: ignore[return-value]


def naive(up: torch.Tensor, down: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Both factors to the nearest, each by itself."""
    return nearest(up, grid, SCALE).values(torch.float64) @ nearest(down, grid, SCALE).values(torch.float64)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("kinds", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced(shape: tuple[int, int], kinds: tuple[str, str], bits: int) -> None:
    weight, left, right, outer, inner, up, down = prepared(shape, kinds)
    grid, exact = Grid(bits, 16), loss(weight, up @ down, outer, inner)
    found = MatrixRounding(weight, left, right, SCALE).balanced(up, down, (grid, grid))
    first, second = found.weights
    assert first.codes.shape == down.shape
    assert second.codes.shape == up.shape
    product = second.values(torch.float64) @ first.values(torch.float64)
    assert torch.equal(found.product(), product)
    assert found.loss == pytest.approx(loss(weight, product, outer, inner))
    assert exact * (1 - 1e-6) <= found.loss
    assert found.loss - exact < 0.7 * (loss(weight, naive(up, down, grid), outer, inner) - exact)


@pytest.mark.parametrize("kinds", PAIRS, ids=str)
def test_dense(kinds: tuple[str, str]) -> None:
    weight, left, right, outer, inner, _, _ = prepared((96, 64), kinds)
    rounding = MatrixRounding(weight, left, right, SCALE)
    losses = []
    for bits in (8, 6, 5, 4, 3, 2):
        found = rounding.dense(Grid(bits, 32))
        assert found.loss == pytest.approx(loss(weight, found.product(), outer, inner))
        losses.append(found.loss)
        assert len(found.weights) == 1
    assert losses == sorted(losses)
    # A bit halves the step and quarters the loss.
    assert losses[3] / losses[1] == pytest.approx(16, rel=0.35)


def test_the_second_factor_makes_up_for_the_first() -> None:
    weight, left, right, outer, inner, up, down = prepared((96, 64), ("matrix", "matrix"))
    coarse, fine = Grid(3, 16), Grid(8, 16)
    found = MatrixRounding(weight, left, right, SCALE).balanced(up, down, (coarse, fine))
    first = found.weights[0].values(torch.float64)
    wanted, gram = fitted(weight, first, right)
    assert torch.allclose(gram, first @ inner @ first.T)
    assert torch.allclose(wanted @ gram, weight @ inner @ first.T)  # the normal equations
    best = loss(weight, wanted @ first, outer, inner)
    assert best <= found.loss < 1.01 * best


def test_another_basis_where_it_helps() -> None:
    """A spectrum that falls by a factor of 400: what feedback leaves follows its geometric mean."""
    weight = normal(160, 40, seed=1) * torch.linspace(0, -6, 40, dtype=torch.float64).exp() @ normal(40, 80, seed=2)
    factors = factorize(weight, RANK, torch.float64)
    rounding = MatrixRounding(weight, None, None, SCALE)
    found: dict[str, RoundedMatrix] = {
        each.way: each for each in rounding._balanced(factors.up, factors.down, (Grid(6, 16), Grid(6, 16)))
    }
    assert rounding.balanced(factors.up, factors.down, (Grid(6, 16), Grid(6, 16))).way == "equalized"
    assert found["equalized"].loss < found["singular vectors"].loss
    values = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    x, y = equalized(values)
    assert torch.allclose(x @ y.T, values.diag())


def test_components_of_zeros() -> None:
    """A matrix of less than the asked-for rank."""
    weight = normal(48, 5, seed=3) @ normal(5, 32, seed=4)
    right = metric("matrix", 32, 2)
    factors = factorize(weight, 16, torch.float64, right=right)
    assert not bool(factors.up[:, 5:].any())
    grids = (Grid(8, 16), Grid(8, 16))
    found = MatrixRounding(weight, None, right, SCALE).balanced(factors.up, factors.down, grids)
    assert bool(torch.isfinite(found.product()).all())
    assert found.loss < 1e-3 * loss(weight, torch.zeros_like(weight), torch.eye(48, dtype=torch.float64), right)
