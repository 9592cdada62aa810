"""The error of a layer's outputs at every rank, against products that are multiplied out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metrics import KINDS, SHAPES, dense, loss, metric, normal

from svdconvert.linalg.exact import decompose, truncate
from svdconvert.linalg.output_losses import output_losses
from svdconvert.methods.table import shrink

# How a method's metric on the inputs comes from their second moments.
RIGHTS = ["same", "shrunk", "vector", "identity"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", ["identity", "matrix", "outliers", "vector"])
@pytest.mark.parametrize("right", RIGHTS)
@pytest.mark.parametrize("inputs", ["matrix", "outliers"])
def test_every_rank(shape: tuple[int, int], left: str, right: str, inputs: str) -> None:
    m, n = shape
    weight, lefts, gram = normal(m, n), metric(left, m, 1), metric(inputs, n, 2)
    assert gram is not None
    rights = {"same": gram, "shrunk": shrink(gram, 0.3), "vector": metric("vector", n, 3), "identity": None}[right]
    found = decompose(weight, left=lefts, right=rights)
    curve = output_losses(weight, found, lefts, rights, gram)
    whole = loss(weight, torch.zeros(m, n, dtype=torch.float64), dense(None, m), gram)
    # Plain SVD may be solved in float32.
    tolerance = 1e-8 if lefts is not None or rights is not None else 1e-5
    assert curve.shape == (min(m, n) + 1,)
    assert float(curve[0]) == pytest.approx(whole, rel=1e-9)
    for rank in range(1, min(m, n) + 1):
        factors = truncate(weight, found, rank, torch.float64, None, lefts, rights)
        direct = loss(weight, factors.up @ factors.down, dense(None, m), gram)
        assert float(curve[rank]) == pytest.approx(direct, rel=1e-6, abs=tolerance * whole), rank
    assert float(curve[-1]) <= tolerance * whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("shrunk", [False, True])
def test_singular_inputs(shape: tuple[int, int], left: str, shrunk: bool) -> None:
    """Fewer samples than channels: up to the rank of the weighted problem."""
    m, n = shape
    weight, lefts, gram = normal(m, n), metric(left, m, 1), metric("singular", n, 2)
    assert gram is not None
    rights = shrink(gram, 0.2) if shrunk else gram
    found = decompose(weight, left=lefts, right=rights)
    curve = output_losses(weight, found, lefts, rights, gram)
    whole = loss(weight, torch.zeros(m, n, dtype=torch.float64), dense(None, m), gram)
    assert float(curve[0]) == pytest.approx(whole, rel=1e-9)
    for rank in range(1, int((found.spectrum > 1e-9 * found.spectrum[0]).sum()) + 1):
        factors = truncate(weight, found, rank, torch.float64, None, lefts, rights)
        direct = loss(weight, factors.up @ factors.down, dense(None, m), gram)
        assert float(curve[rank]) == pytest.approx(direct, rel=1e-5, abs=1e-8 * whole), rank


@settings(max_examples=40)
@given(m=st.integers(2, 24), n=st.integers(2, 24), seed=st.integers(0, 1000), two_sided=st.booleans())
def test_laws(m: int, n: int, seed: int, two_sided: bool) -> None:
    """More rank never adds error in the inputs' own metric, and no method beats the one that minimises it."""
    weight, gram = normal(m, n, seed=seed), metric("matrix", n, seed + 1)
    lefts = metric("matrix", m, seed + 2) if two_sided else None
    assert gram is not None
    curve = output_losses(weight, decompose(weight, left=lefts, right=gram), lefts, gram, gram)
    assert float(curve.diff().max()) <= 1e-9 * float(curve[0])
    best = torch.linalg.svdvals(weight @ torch.linalg.cholesky(gram + 1e-14 * dense(None, n))).square()
    tails = torch.cat([best.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    assert bool((curve >= tails - 1e-7 * tails[0]).all())


def test_zero_weight() -> None:
    gram = dense(metric("matrix", 8, 0), 8)
    lefts = dense(metric("matrix", 6, 1), 6)
    weight = torch.zeros(6, 8, dtype=torch.float64)
    assert not output_losses(weight, decompose(weight, left=lefts, right=gram), lefts, gram, gram).any()
