"""The solver in a pair of metrics, against roots, inverses and full SVDs written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metrics import KINDS, SHAPES, dense, loss, metric, normal, root

from svdconvert.errors import InputError
from svdconvert.linalg.exact import decompose, factorize, truncate


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_loss_is_the_tail_of_the_weighted_spectrum(shape: tuple[int, int], left: str, right: str) -> None:
    m, n = shape
    weight = normal(m, n)
    lefts, rights = metric(left, m, 1), metric(right, n, 2)
    full_left, full_right = dense(lefts, m), dense(rights, n)
    spectrum = torch.linalg.svdvals(root(full_left) @ weight @ root(full_right)).square()
    found = decompose(weight, left=lefts, right=rights)
    scale = float(spectrum.sum())
    # Plain SVD may be solved in float32.
    exact = 1e-12 if left != "identity" or right != "identity" else 1e-6
    assert torch.allclose(found.spectrum, spectrum, rtol=1e-6, atol=10 * exact * scale)
    for rank in (1, min(shape) // 3, min(shape) - 1):
        factors = truncate(weight, found, rank, torch.float64 if exact < 1e-6 else torch.float32, None, lefts, rights)
        product = factors.up.double() @ factors.down.double()
        measured = loss(weight, product, full_left, full_right)
        optimum = float(spectrum[rank:].sum())
        assert measured == pytest.approx(optimum, rel=1e-5, abs=2e-6 * scale)
        assert factors.metric_loss == pytest.approx(measured, rel=1e-5, abs=2e-6 * scale)
        plain = float((weight - product).norm() / weight.norm())
        assert factors.relative_error == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["identity", "vector", "matrix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_of_rounded_factors_in_panels(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bases", "panels", "residual"):
        monkeypatch.setattr(f"svdconvert.linalg.{module}.PANEL", 13)
    m, n = shape
    weight, lefts, rights = normal(m, n), metric(kind, m, 1), metric(kind, n, 2)
    if kind == "identity":
        rights = torch.ones(n, dtype=torch.float64)
    factors = factorize(weight, 9, dtype, left=lefts, right=rights)
    measured = loss(weight, factors.up.double() @ factors.down.double(), dense(lefts, m), dense(rights, n))
    assert factors.metric_loss == pytest.approx(measured, rel=1e-9)
    full = root(dense(lefts, m)) @ weight @ root(dense(rights, n))
    optimum = float(torch.linalg.svdvals(full)[9:].square().sum())
    assert factors.rounding_excess == pytest.approx(measured / optimum - 1, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_is_that_of_svd_llm(shape: tuple[int, int]) -> None:
    """Cholesky root, full SVD of W S, inverse: the recipe of arXiv:2403.07378."""
    weight, right = normal(*shape), metric("matrix", shape[1], 3)
    assert right is not None
    s = torch.linalg.cholesky(right)
    u, values, v = torch.linalg.svd(weight @ s, full_matrices=False)
    theirs = (u[:, :10] * values[:10]) @ v[:10] @ torch.linalg.inv(s)
    ours = factorize(weight, 10, torch.float64, right=right)
    assert torch.allclose(ours.up @ ours.down, theirs, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_drone_is_whitening(shape: tuple[int, int]) -> None:
    """min over rank r of ||(W - M) X||: the error is the tail of the singular values of W X."""
    weight, inputs = normal(*shape), normal(shape[1], 200, seed=4)
    tail = torch.linalg.svdvals(weight @ inputs)[10:].norm()
    factors = factorize(weight, 10, torch.float64, right=inputs @ inputs.T)
    assert float(torch.linalg.norm((weight - factors.up @ factors.down) @ inputs)) == pytest.approx(float(tail))


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_metrics_give_plain_svd(shape: tuple[int, int]) -> None:
    m, n = shape
    weight = normal(m, n).float()
    plain = factorize(weight, 8, torch.float32)
    for lefts, rights in (
        (torch.ones(m), torch.ones(n)),
        (torch.eye(m).double(), torch.eye(n).double()),
        (None, 3 * torch.eye(n).double()),
    ):
        weighted = factorize(weight, 8, torch.float32, left=lefts, right=rights)
        assert torch.allclose(weighted.up @ weighted.down, plain.up @ plain.down, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotations_carry_over(shape: tuple[int, int]) -> None:
    """Another basis for inputs and outputs changes the factors and nothing else."""
    m, n = shape
    weight, lefts, rights = normal(m, n), metric("matrix", m, 1), metric("matrix", n, 2)
    assert lefts is not None
    assert rights is not None
    p, q = torch.linalg.qr(normal(m, m, seed=5))[0], torch.linalg.qr(normal(n, n, seed=6))[0]
    one = factorize(weight, 9, torch.float64, left=lefts, right=rights)
    two = factorize(p @ weight @ q.T, 9, torch.float64, left=p @ lefts @ p.T, right=q @ rights @ q.T)
    assert torch.allclose(p @ one.up @ one.down @ q.T, two.up @ two.down, atol=1e-8)
    assert one.metric_loss == pytest.approx(two.metric_loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_is_reported_in_the_metric(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    weight, lefts, rights = normal(m, n).to(dtype), metric("matrix", m, 1), metric("outliers", n, 2)
    factors = factorize(weight, 12, dtype, left=lefts, right=rights)
    measured = loss(weight.double(), factors.up.double() @ factors.down.double(), dense(lefts, m), dense(rights, n))
    assert factors.metric_loss == pytest.approx(measured, rel=1e-6)
    assert factors.metric_error >= factors.optimal_error * (1 - 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_refit_beats_rounding_both(shape: tuple[int, int]) -> None:
    weight, rights = normal(*shape), metric("outliers", shape[1], 2)
    exact = factorize(weight, 12, torch.float64, right=rights)
    naive = exact.up.bfloat16().double() @ exact.down.bfloat16().double()
    ours = factorize(weight, 12, torch.bfloat16, right=rights)
    assert ours.metric_loss < loss(weight, naive, dense(None, shape[0]), dense(rights, shape[1]))


def test_zero_importance_rows_are_still_fitted() -> None:
    """An output that the left metric does not see gets the least-squares fit, not nothing."""
    weight = normal(60, 20)
    weight[::2] = normal(30, 30, seed=8) @ weight[1::2]  # in the span of what is kept
    lefts = (torch.arange(60) % 2).double()
    factors = factorize(weight, 15, torch.float64, left=lefts)
    seen, unseen = (float((weight - factors.up @ factors.down)[i::2].norm() / weight[i::2].norm()) for i in (1, 0))
    assert unseen < 2 * seen + 0.2


@settings(max_examples=40)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    seed=st.integers(0, 1000),
    left=st.sampled_from(KINDS),
    right=st.sampled_from(KINDS),
    fraction=st.floats(0, 1),
)
def test_never_beaten_by_another_product(m: int, n: int, seed: int, left: str, right: str, fraction: float) -> None:
    weight = normal(m, n, seed=seed)
    lefts, rights = metric(left, m, seed + 1), metric(right, n, seed + 2)
    full_left, full_right = dense(lefts, m), dense(rights, n)
    rank = max(1, round(fraction * min(m, n)))
    ours = factorize(weight, rank, torch.float64, left=lefts, right=rights)
    total = loss(weight, torch.zeros(m, n).double(), full_left, full_right)
    mine = loss(weight, ours.up @ ours.down, full_left, full_right)
    assert mine <= total * (1 + 1e-9)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = loss(weight, (u[:, :rank] * s[:rank]) @ v[:rank], full_left, full_right)
    assert mine <= plain * (1 + 1e-5) + 1e-6 * total


@pytest.mark.parametrize("row", [True, False])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_factors_beyond_float16_are_refused(shape: tuple[int, int], row: bool) -> None:
    """Either factor: the one whose side has it all in one channel."""
    weight = normal(*shape).float()
    weight[0 if row else slice(None), slice(None) if row else 0] = 4e9
    right = torch.ones(shape[1], dtype=torch.float64)
    factors = factorize(weight, 4, torch.float32, right=right)
    most = torch.finfo(torch.float16).max
    assert [float(factor.abs().max()) > most for factor in (factors.up, factors.down)] == [row, not row]
    with pytest.raises(InputError, match="a factor of it is not finite in float16"):
        factorize(weight, 4, torch.float16, right=right)
