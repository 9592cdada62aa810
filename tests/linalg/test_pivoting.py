"""The pivoted layout: lossless but for rounding, well conditioned, and cheaper."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metrics import normal

from svdconvert.layouts.table import LAYOUTS
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.pivot import LARGEST_COEFFICIENT, full_up, pivot, product, rounded_coefficients
from svdconvert.tensors import TensorInfo


@settings(max_examples=60)
@given(m=st.integers(2, 40), n=st.integers(1, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 999))
def test_the_same_product(m: int, n: int, share: float, seed: int) -> None:
    rank = max(1, min(int(share * m), n, m - 1))
    up, down = normal(m, rank, seed=seed), normal(rank, n, seed=seed + 1)
    rows, coefficients, position = pivot(up, down, torch.float64)
    dense = up @ down
    assert rows.shape == (rank, n)
    assert coefficients.shape == (m - rank, rank)
    assert sorted(position.tolist()) == list(range(m))
    assert torch.allclose(product(rows, coefficients, position), dense, atol=1e-9 * float(dense.abs().max()))
    assert torch.allclose(full_up(coefficients, position) @ rows, dense, atol=1e-9 * float(dense.abs().max()))
    assert float(coefficients.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-9)
    # The stored rows are rows of the product.
    chosen = torch.argsort(position)[:rank]
    assert torch.allclose(rows, dense[chosen], atol=1e-9 * float(dense.abs().max()))


def test_less_than_full_rank() -> None:
    up, down = normal(30, 8), normal(8, 20, seed=1)
    up[:, 5] = 0
    up[:, 6] = up[:, 2]
    rows, coefficients, position = pivot(up, down, torch.float64)
    assert torch.allclose(product(rows, coefficients, position), up @ down, atol=1e-12)
    assert float(coefficients.abs().max()) <= LARGEST_COEFFICIENT * (1 + 1e-9)


def test_ill_chosen_rows_would_be_worse() -> None:
    """The first rows span everything too, but amplify rounding; that is what the choice is for."""
    up, down = normal(300, 60), normal(60, 80, seed=1)
    up[:60] *= 1e-3
    up[:60] += normal(60, 1, seed=2) @ normal(1, 60, seed=3)
    dense = up @ down
    rows, coefficients, position = pivot(up, down, torch.float16)
    ours = float((product(rows, coefficients, position) - dense).norm() / dense.norm())
    first = (up[:60] @ down).half().double()
    naive = torch.linalg.solve(up[:60], up[60:], left=False).half().double() @ first
    theirs = float((torch.cat([first, naive]) - dense).norm() / dense.norm())
    assert ours < 2e-3
    assert theirs > 10 * ours


@pytest.mark.parametrize("metric", [None, "vector", "matrix"])
def test_refit_makes_rounding_good(metric: str | None) -> None:
    weight = normal(90, 40)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    samples = normal(200, 40, seed=5) * (1 + 30 * (torch.arange(40) % 5 == 0))
    right = {None: None, "vector": samples.square().mean(0), "matrix": samples.T @ samples / 200}[metric]
    full = torch.eye(40).double() if right is None else (right if right.dim() == 2 else right.diag())
    rows, coefficients, position = pivot(u[:, :20] * s[:20], v[:20], torch.bfloat16)

    def loss(coefficients: torch.Tensor) -> float:
        error = weight - product(rows, coefficients, position)
        return float((error @ full * error).sum())

    better = rounded_coefficients(weight, rows, position, right, torch.float64)
    assert loss(better) <= loss(coefficients)
    assert loss(better.bfloat16()) < loss(coefficients) * 1.001
    # It is the optimum: nothing near it is better.
    for seed in range(5):
        assert loss(better + 1e-3 * normal(70, 20, seed=seed)) > loss(better)


@pytest.mark.parametrize("name", LAYOUTS)
def test_costs(name: str) -> None:
    layout = LAYOUTS[name]
    for shape in ((30, 30), (60, 20), (20, 60)):
        for rank in range(1, min(shape)):
            stored = layout.tensors("x.weight", rank, shape, "F16")
            assert layout.cost(rank, shape) == sum(info.size for info in stored if info.dtype == "F16")
            saves = layout.cost(rank, shape) < shape[0] * shape[1]
            assert saves == (rank < layout.break_even(shape))
        for params in (10, 500, 900, 5000):
            rank = layout.highest_rank(shape, params)
            assert rank == 0 or layout.cost(rank, shape) <= params
            assert rank == min(shape) or layout.cost(rank + 1, shape) > params


def test_names() -> None:
    assert [info.name for info in LAYOUTS["pivoted"].tensors("a.weight", 2, (5, 4), "F16")] == [
        "a.down.weight",
        "a.up.weight",
        "a.position",
    ]
    assert LAYOUTS["pivoted"].tensors("a.weight", 2, (5, 4), "F16")[2] == TensorInfo("a.position", "I64", (5,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_row_that_the_metric_does_not_see(dtype: torch.dtype) -> None:
    """No output depends on it; the others fit as if it were not there."""
    rows = normal(4, 12, seed=1)
    rows[1, :-1] = 0
    right = torch.ones(12, dtype=torch.float64)
    right[-1] = 0
    weight, position = normal(10, 12, seed=2), torch.arange(10)
    found = rounded_coefficients(weight, rows, position, right, dtype)
    assert torch.isfinite(found).all()
    others = rows[[0, 2, 3]]
    best = torch.linalg.lstsq(others[:, :-1].T, weight[4:, :-1].T).solution.T
    assert torch.allclose(found[:, [0, 2, 3]].double(), best, rtol=0, atol=0.02 if dtype == torch.bfloat16 else 1e-12)
    assert not found[:, 1].any()


@pytest.mark.parametrize("seed", range(4))
def test_a_row_that_float16_has_no_numbers_for(seed: int) -> None:
    """An output with tiny weights on one massive input is among the rows, and zeros when it is stored."""
    weight, right = normal(40, 32, seed=seed).float(), torch.ones(32, dtype=torch.float64)
    weight[:, 0] = 0
    weight[0] = 0
    weight[0, 0] = 1e-8
    right[0] = 4e17
    found = LAYOUTS["pivoted"].truncate(
        weight, lambda dtype: factorize(weight, 16, dtype, right=right), torch.float16, None, right
    )
    rows, coefficients, _ = found.tensors
    assert not rows.any(dim=1).all()
    assert float(coefficients.abs().max()) < 2
    others = torch.linalg.svdvals(weight[:, 1:].double())
    best = float(others[15:].norm() / others.norm())  # one rank went to that output
    assert found.relative_error < 1.05 * best
