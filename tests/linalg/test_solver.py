"""The solver against float64 SVDs and against the laws of the truncated SVD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.matrices import excess, matrix, power_law

from svdconvert.errors import InputError
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.panels import Workspace

SHAPES = [(96, 96), (288, 96), (96, 384), (200, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.8, 2.0])
@pytest.mark.parametrize("rank", [1, 24, 60])
def test_optimal_in_float32(shape: tuple[int, int], exponent: float, rank: int) -> None:
    weight = matrix(*shape, power_law(min(shape), exponent)).float()
    factors = factorize(weight, rank, torch.float32)
    assert -1e-6 <= excess(weight, factors.down, factors.up) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    weight = matrix(*shape, power_law(min(shape), 0.5)).float()
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 20, 64):
        factors = factorize(weight, rank, torch.float32)
        expected = math.sqrt(float((values[rank:] ** 2).sum() / (values**2).sum()))
        assert factors.optimal_error == pytest.approx(expected, rel=1e-5)
        assert factors.relative_error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_reported_error_is_that_of_the_stored_factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for exponent, rank in ((0.3, 20), (0.8, 90), (3.0, 30)):
        weight = matrix(*shape, power_law(min(shape), exponent)).to(dtype)
        factors = factorize(weight, rank, dtype)
        assert factors.down.dtype == factors.up.dtype == dtype
        product = factors.up.double() @ factors.down.double()
        true = float(torch.linalg.norm(weight.double() - product) / torch.linalg.norm(weight.double()))
        assert factors.relative_error == pytest.approx(true, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced(shape: tuple[int, int]) -> None:
    weight = matrix(*shape, power_law(min(shape), 0.5)).float()
    factors = factorize(weight, 32, torch.float32)
    assert float(factors.down.norm()) == pytest.approx(float(factors.up.norm()), rel=1e-4)
    # (U sqrt S) and (sqrt S V): the Gram matrix of each is diag(S).
    singular = torch.linalg.svdvals(weight.double())[:32]
    for gram in (factors.down @ factors.down.T, factors.up.T @ factors.up):
        assert torch.allclose(gram.double().diagonal(), singular, rtol=1e-4)
        assert float((gram - gram.diagonal().diag()).abs().max()) < 1e-4 * float(singular[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape: tuple[int, int]) -> None:
    weight = matrix(*shape, power_law(min(shape), 0.5)).float()
    factors = factorize(weight, min(shape), torch.float32)
    assert float(torch.linalg.norm(weight - factors.up @ factors.down) / weight.norm()) < 1e-6
    assert factors.optimal_error == 0
    assert factors.relative_error < 1e-6


def test_refit_makes_rounding_good() -> None:
    """The second factor solves least squares for the rounded first: better than rounding both."""
    weight = matrix(256, 128, power_law(128, 0.2)).float()
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:32].sqrt()
    naive = (u[:, :32] * root).bfloat16().double() @ (root[:, None] * v[:32]).bfloat16().double()
    ours = factorize(weight, 32, torch.bfloat16)
    error = torch.linalg.norm(weight.double() - ours.up.double() @ ours.down.double())
    assert float(error) < float(torch.linalg.norm(weight.double() - naive))
    # What is left is optimal for this `down`: the residual, but for `up`'s own rounding, is orthogonal to it.
    best = weight.double() @ torch.linalg.pinv(ours.down.double())
    assert torch.equal(best.bfloat16(), ours.up) or float((best - ours.up.double()).abs().max()) < 0.01 * float(
        best.abs().max()
    )


def test_wide_dynamic_range_switches_to_float64() -> None:
    spectrum = torch.cat([torch.tensor([1e4]), power_law(127, 0.3)])
    weight = matrix(256, 128, spectrum).float()
    factors = factorize(weight, 40, torch.float32)
    assert factors.precision == "float64"
    assert -1e-4 < excess(weight, factors.down, factors.up) < 1e-4
    assert factorize(matrix(256, 128, power_law(128, 0.3)).float(), 40, torch.float32).precision == "float32"
    # only the values up to the rank count: 40 against 128
    assert factorize(matrix(256, 128, power_law(128, 1.0)).float(), 40, torch.float32).precision == "float32"


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    weight = matrix(64, 48, power_law(48, 0.5)).float()
    scaled = weight * scale
    factors = factorize(scaled, 16, torch.float32)
    assert (
        excess(scaled.double() / scale, factors.down.double() / math.sqrt(scale), factors.up / math.sqrt(scale)) < 1e-5
    )


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(40, 24),
        torch.ones(40, 24),
        torch.eye(32),
        torch.diag(torch.arange(32.0)),
        torch.outer(torch.arange(40.0), torch.arange(24.0)),
        torch.cat([torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(40, 12)], dim=1),
        torch.randn(1, 1, generator=torch.Generator().manual_seed(0)),
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).mul(6e-8).half().float(),
        torch.zeros(16, 16).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(6e4)),
    ],
    ids=["zero", "ones", "identity", "diagonal", "rank one", "dead columns", "one entry", "subnormal", "one large"],
)
def test_degenerate_matrices(weight: torch.Tensor) -> None:
    values = torch.linalg.svdvals(weight.double())
    for rank in {1, min(weight.shape) // 2 or 1, min(weight.shape)}:
        factors = factorize(weight, rank, torch.float32)
        error = float(torch.linalg.norm(weight.double() - factors.up.double() @ factors.down.double()))
        tail = float(values[rank:].norm())
        assert error <= tail * (1 + 1e-5) + 2e-6 * float(values.norm())
        assert math.isfinite(factors.relative_error)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_non_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 16).to(dtype)
    weight[7, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        factorize(weight, 4, dtype)


def test_factors_beyond_float16_are_refused() -> None:
    weight = matrix(64, 64, power_law(64, 1.0)).float() * 1e12
    with pytest.raises(InputError, match="float16"):
        factorize(weight, 4, torch.float16)


@pytest.mark.parametrize("rank", [0, -1, 17])
def test_impossible_ranks(rank: int) -> None:
    with pytest.raises(InputError, match="impossible"):
        factorize(torch.randn(32, 16), rank, torch.float32)


def test_workspace_changes_nothing() -> None:
    """Buffers that held other matrices leave no trace, and results are not views of them."""
    work = Workspace()
    first = matrix(300, 100, power_law(100, 0.4)).half()
    second = matrix(100, 200, power_law(100, 0.6), seed=1).half()
    kept = factorize(first, 20, torch.float16, work)
    copies = kept.down.clone(), kept.up.clone()
    shared = factorize(second, 20, torch.float16, work)
    alone = factorize(second, 20, torch.float16)
    assert torch.equal(shared.down, alone.down)
    assert torch.equal(shared.up, alone.up)
    assert torch.equal(kept.down, copies[0])
    assert torch.equal(kept.up, copies[1])


def test_panels_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices longer than a panel, with a last panel that is not full."""
    monkeypatch.setattr("svdconvert.linalg.panels.PANEL", 100)
    for shape in ((1030, 40), (40, 1030)):
        weight = matrix(*shape, power_law(40, 0.5)).half()
        factors = factorize(weight, 10, torch.float32)
        assert excess(weight, factors.down, factors.up) < 1e-5


@settings(max_examples=40)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    exponent=st.floats(0, 3),
    fraction=st.floats(0, 1),
)
def test_law_of_the_best_approximation(m: int, n: int, seed: int, exponent: float, fraction: float) -> None:
    """For any matrix and rank, no rank-r product is better, and ours is as good but for float32's rounding."""
    weight = matrix(m, n, power_law(min(m, n), exponent), seed).float()
    rank = max(1, round(fraction * min(m, n)))
    factors = factorize(weight, rank, torch.float32)
    error = float(torch.linalg.norm(weight.double() - factors.up.double() @ factors.down.double()))
    tail = float(torch.linalg.svdvals(weight.double())[rank:].norm())
    assert tail * (1 - 1e-6) - 1e-9 <= error <= tail * (1 + 1e-5) + 1e-6 * float(weight.norm())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 20))
def test_rotations_and_transposes_change_nothing(seed: int, rank: int) -> None:
    weight = matrix(30, 20, power_law(20, 0.5), seed)
    q = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    errors = [
        factorize(variant.float(), rank, torch.float32).relative_error for variant in (weight, q @ weight, weight.T)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4, abs=1e-6)
    assert errors[0] == pytest.approx(errors[2], rel=1e-4, abs=1e-6)
