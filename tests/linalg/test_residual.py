"""What a product leaves of its matrix, against norms written out in float64."""

from __future__ import annotations

import pytest
import torch
from support.matrices import matrix, power_law
from support.metrics import normal

from svdconvert.linalg.exact import factorize
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.residual import left_over

SHAPES = [(96, 40), (40, 96), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_what_a_projection_leaves(shape: tuple[int, int], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdconvert.linalg.panels.PANEL", 25)
    weight = normal(*shape, seed=1)
    basis = torch.linalg.qr(normal(min(shape), 7, seed=2)).Q
    rows = weight if shape[0] >= shape[1] else weight.T
    expected = scale**2 * float((rows - rows @ basis @ basis.T).square().sum())
    assert left_over(Scaled(weight, scale, Workspace()), basis) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_the_optimum_of_a_matrix_nearly_of_low_rank(shape: tuple[int, int], dtype: torch.dtype, least: float) -> None:
    """What the spectrum's sum can no longer tell is formed, and is not what rounding to bfloat16 makes of it."""
    k, rank = min(shape), 8
    spectrum = torch.cat([power_law(rank, 0.5), least * power_law(k - rank, 0.5)])
    weight = matrix(*shape, spectrum).to(dtype)
    found = factorize(weight, rank, torch.bfloat16)
    values = torch.linalg.svdvals(weight.double())
    best = float((values[rank:].square().sum() / values.square().sum()).sqrt())
    assert found.optimal_error == pytest.approx(best, rel=1e-2)
