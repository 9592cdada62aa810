"""The least-squares partner of a factor, and how far products are from their matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metrics import normal

from svdconvert.errors import InputError
from svdconvert.linalg.metrics import apply_metric
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.partner import partner, pseudo_inverse
from svdconvert.linalg.precision import refuse_overflow
from svdconvert.linalg.residual import relative_difference, relative_error

sizes = st.integers(3, 30)


@settings(max_examples=60)
@given(m=sizes, n=sizes, kind=st.sampled_from(["none", "diagonal", "whole"]), seed=st.integers(0, 99))
def test_the_partner_solves_the_normal_equations(m: int, n: int, kind: str, seed: int) -> None:
    """For the factor of the inputs, whatever the shape: what is left has no part in it, in the metric."""
    weight, rank = normal(m, n, seed=seed), min(m, n, 4)
    small = normal(n, rank, seed=seed + 1)
    inputs = normal(3 * n, n, seed=seed + 2)
    metric = {"none": None, "diagonal": inputs.square().mean(0), "whole": inputs.T @ inputs / (3 * n)}[kind]
    weighted = apply_metric(metric, small)
    found = partner(Scaled(weight, 1.0, Workspace(), by_rows=True), pseudo_inverse(small, weighted))
    assert found.shape == (m, rank)
    left = (weight - found @ small.T) @ weighted
    assert float(left.abs().max()) < 1e-9 * float(weighted.abs().max()) * n


def test_the_smaller_side_decides_by_itself() -> None:
    wide = normal(5, 12)
    factor = normal(5, 2, seed=1)
    found = partner(Scaled(wide, 1.0, Workspace()), pseudo_inverse(factor, factor))
    torch.testing.assert_close(found, torch.linalg.lstsq(factor, wide).solution)


def test_panels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, up, down = normal(70, 20), normal(70, 3, seed=1), normal(3, 20, seed=2)
    solved = pseudo_inverse(down.T, down.T)
    whole = partner(Scaled(weight, 1.0, Workspace(), by_rows=True), solved), relative_error(weight, up, down)
    for module in ("panels", "residual"):
        monkeypatch.setattr(f"svdconvert.linalg.{module}.PANEL", 16)
    pieces = partner(Scaled(weight, 1.0, Workspace(), by_rows=True), solved), relative_error(weight, up, down)
    torch.testing.assert_close(pieces[0], whole[0])
    assert pieces[1] == pytest.approx(whole[1], rel=1e-12)


def test_a_ridge_makes_singular_columns_harmless() -> None:
    small = normal(8, 3)
    small[:, 1] = 0
    solved = pseudo_inverse(small, small, ridge=1e-6)
    assert bool(torch.isfinite(solved).all())
    assert not bool(solved[1].any())
    without = pseudo_inverse(small[:, [0, 2]], small[:, [0, 2]])
    torch.testing.assert_close(solved[[0, 2]], without, rtol=1e-4, atol=1e-6)


@settings(max_examples=60)
@given(m=sizes, n=sizes, seed=st.integers(0, 99))
def test_relative_errors(m: int, n: int, seed: int) -> None:
    weight, up, down = normal(m, n, seed=seed), normal(m, 2, seed=seed + 1), normal(2, n, seed=seed + 2)
    expected = float((weight - up @ down).norm() / weight.norm())
    assert relative_error(weight, up, down) == pytest.approx(expected, rel=1e-10)
    assert relative_difference(weight, up @ down) == pytest.approx(expected, rel=1e-10)
    metric = normal(n, n, seed=seed + 3)
    metric = metric @ metric.T
    root = torch.linalg.cholesky(metric)
    seen = float(((weight - up @ down) @ root).norm() / (weight @ root).norm())
    assert relative_error(weight, up, down, metric) == pytest.approx(seen, rel=1e-6)
    assert relative_error(torch.zeros(m, n), up, down) == 0


def test_overflow_is_refused_by_name() -> None:
    refuse_overflow(torch.ones(3).half(), "w", "scale it")
    for bad in (7e4, float("nan"), -7e4):
        with pytest.raises(InputError, match=r"^w is not finite in float16; scale it$"):
            refuse_overflow(torch.tensor([1.0, bad]).half(), "w", "scale it")


@pytest.mark.parametrize("unit", [1.0, 2.0**-20])
def test_a_factor_with_dependent_columns(unit: float) -> None:
    """The projection onto what the columns span, whatever their lengths; a column that the metric does not see."""
    samples = normal(60, 20, seed=1)
    inner = samples.T @ samples / 60
    span = normal(20, 3, seed=2)
    one, two, three = span.T
    small = unit * torch.stack([one, 8 * one, two / 4, torch.zeros(20), three], dim=1)
    solved = pseudo_inverse(small, inner @ small)
    expected = span @ torch.linalg.solve(span.T @ inner @ span, span.T @ inner)
    assert torch.allclose(small @ solved, expected, atol=1e-9)
    assert not solved[3].any()


@pytest.mark.parametrize(("spread", "inverted"), [(0.002, True), (0.9, False)])
def test_columns_that_are_nearly_orthogonal(spread: float, inverted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inverse takes the place of two solves there, and gives the same; where they are not, it does not."""
    generator = torch.Generator().manual_seed(0)
    small = torch.linalg.qr(torch.randn(80, 20, generator=generator))[0]
    small = (small + spread * small.roll(1, 1)) * torch.linspace(0.1, 9, 20)
    called, inverse = [], torch.cholesky_inverse
    monkeypatch.setattr("torch.cholesky_inverse", lambda root: called.append(root) or inverse(root))
    found = pseudo_inverse(small, small)
    assert bool(called) == inverted
    wanted = torch.linalg.pinv(small.double())
    assert float((found - wanted).norm()) < 1e-5 * float(wanted.norm())
