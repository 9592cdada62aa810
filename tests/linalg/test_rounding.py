"""Rounding of factors where a few components outweigh the rest, against losses written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.accelerator import DEVICE, device_reads, on_host
from support.metrics import normal

from svdconvert.factoring.decompositions import Decompositions, load_decomposition
from svdconvert.linalg import bases
from svdconvert.linalg.bases import NEGLIGIBLE_EXCESS
from svdconvert.linalg.exact import decompose, truncate
from svdconvert.linalg.pivot import pivot, product, rounded_coefficients
from svdconvert.linalg.results import SINGULAR, Factors
from svdconvert.linalg.rounding import BASES, geometric_mean_decomposition, round_with_feedback
from svdconvert.planning.ranks import Target
from tests.benchmarks.rounding import KINDS, second_moments, spectral

SHAPES = [(160, 80), (80, 160), (96, 96)]
RANK = 32


def true_loss(weight: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor, of: torch.Tensor) -> float:
    error = weight - of
    return float(((error if left is None else left @ error) @ right * error).sum())


def excess(weight: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor, of: torch.Tensor) -> float:
    tail = decompose(weight, left=left, right=right).spectrum[RANK:].sum()
    return true_loss(weight, left, right, of) / float(tail) - 1


def multiplied(factors: Factors) -> torch.Tensor:
    return factors.up.double() @ factors.down.double()


def kept(shape: tuple[int, int], left: torch.Tensor | None, right: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The metrics as a decomposition's file has them: of the one on the longer side the diagonal."""
    if shape[0] >= shape[1]:
        return None if left is None else left.diagonal(), right
    return left, right.diagonal()


def nearest(monkeypatch: pytest.MonkeyPatch, *given: object) -> Factors:
    with monkeypatch.context() as only:
        only.setattr(bases, "BASES", {})
        return truncate(*given)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["offset", "massive"])
@pytest.mark.parametrize("outputs", [None, "benign", "massive"])
def test_massive_channels(
    shape: tuple[int, int], kind: str, outputs: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, n = shape
    weight, right = spectral(m, n, 0), second_moments(n, kind, 1)
    left = None if outputs is None else second_moments(m, outputs, 2)
    found, metrics = decompose(weight, left=left, right=right), kept(shape, left, right)
    factors = truncate(weight, found, RANK, dtype, None, *metrics)
    before = nearest(monkeypatch, weight, found, RANK, dtype, None, *metrics)
    ours, theirs = (excess(weight, left, right, multiplied(each)) for each in (factors, before))
    assert theirs > NEGLIGIBLE_EXCESS
    assert ours < theirs / 5
    assert factors.basis in BASES
    # Of the longer side the diagonal is known alone, which takes errors of massive channels for independent.
    assert factors.rounding_excess is not None
    assert ours / 3 < factors.rounding_excess < 3 * ours


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_benign_channels_keep_their_singular_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    weight, right = spectral(m, n, 0), second_moments(n, "benign", 1)
    factors = truncate(weight, decompose(weight, right=right), RANK, dtype, None, *kept(shape, None, right))
    assert factors.basis == SINGULAR
    assert factors.rounding_excess is not None
    assert factors.rounding_excess < NEGLIGIBLE_EXCESS


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_left_alone(shape: tuple[int, int]) -> None:
    m, n = shape
    weight, right = spectral(m, n, 0), 1e12 * second_moments(n, "massive", 1)
    found = decompose(weight, right=right)
    factors = truncate(weight, found, RANK, torch.float32, None, *kept(shape, None, right))
    assert factors.basis == SINGULAR


@settings(max_examples=40)
@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_no_candidate_is_better(m: int, n: int, share: float, seed: int, kind: str, dtype: torch.dtype) -> None:
    weight, right = normal(m, n, seed=seed), second_moments(n, kind, seed + 1)
    rank = max(1, round(share * min(m, n)))
    found = decompose(weight, right=right)
    tail = float(found.spectrum[rank:].sum())
    losses = []
    chosen = truncate(weight, found, rank, dtype, right=right)
    for rows in ({}, *({name: row} for name, row in BASES.items())):
        with pytest.MonkeyPatch.context() as only:
            only.setattr(bases, "BASES", rows)
            losses.append(truncate(weight, found, rank, dtype, right=right).metric_loss)
    assert chosen.metric_loss <= max(min(losses), (1 + NEGLIGIBLE_EXCESS) * tail)
    scale = float(found.spectrum.sum())
    measured = true_loss(weight, None, right, multiplied(chosen))
    assert chosen.metric_loss == pytest.approx(measured, rel=1e-5, abs=1e-11 * scale)


@settings(max_examples=60)
@given(logs=st.lists(st.floats(-7, 7), min_size=1, max_size=40))
def test_geometric_mean_decomposition(logs: list[float]) -> None:
    values = torch.tensor(logs, dtype=torch.float64).exp()
    q, t, p = geometric_mean_decomposition(values)
    eye = torch.eye(len(logs), dtype=torch.float64)
    assert torch.allclose(q.T @ q, eye, atol=1e-10)
    assert torch.allclose(p.T @ p, eye, atol=1e-10)
    assert torch.allclose(q @ t @ p.T, values.diag(), atol=1e-9 * float(values.max()))
    assert torch.equal(t, t.triu())
    mean = values.log().mean().exp()
    assert torch.allclose(t.diagonal(), mean.expand(len(logs)), rtol=1e-6)


@settings(max_examples=60)
@given(logs=st.lists(st.floats(-7, 7), min_size=1, max_size=40), name=st.sampled_from(list(BASES)))
def test_bases_are_of_the_same_product(logs: list[float], name: str) -> None:
    values = torch.tensor(logs, dtype=torch.float64).exp().sort(descending=True).values
    x, y = BASES[name](values)
    assert torch.allclose(x @ y.T, values.diag(), atol=1e-9 * float(values.max()))


@pytest.mark.parametrize("name", BASES)
def test_bases_are_where_the_values_are(name: str) -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    with device_reads():
        found = BASES[name](values.to(DEVICE))
        assert [factor.device.type for factor in found] == [DEVICE.type] * 2
    for there, here in zip(found, BASES[name](values), strict=True):
        assert torch.equal(on_host(there), here)


@pytest.mark.parametrize("name", BASES)
def test_bases_of_values_that_vanish(name: str) -> None:
    x, y = BASES[name](torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert bool(torch.isfinite(x).all())
    assert bool(torch.isfinite(y).all())


@settings(max_examples=60)
@given(r=st.integers(1, 150), samples=st.integers(1, 200), seed=st.integers(0, 999))
def test_feedback_is_never_worse_than_the_nearest(r: int, samples: int, seed: int) -> None:
    rows, inputs = normal(7, r, seed=seed), normal(samples, r, seed=seed + 1) + 3
    gram = inputs.T @ inputs  # singular where there are few samples
    rounded = round_with_feedback(rows, gram, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16

    def cost(each: torch.Tensor) -> torch.Tensor:
        error = each.double() - rows
        return (error @ gram * error).sum(dim=1)

    assert bool((cost(rounded) <= cost(rows.bfloat16()) * (1 + 1e-9) + 1e-12).all())


def test_feedback_is_successive_cancellation() -> None:
    """Column by column: each takes the value nearest to what the errors so far leave to be wished for."""
    r = 100  # more than one block
    rows, inputs = normal(5, r), normal(300, r, seed=1) + 2 * normal(300, 1, seed=2)
    gram = inputs.T @ inputs
    wanted = rows.clone()
    for j in range(r):
        error = wanted[:, j].bfloat16().double() - wanted[:, j]
        wanted[:, j] += error
        rest = gram[j + 1 :, j + 1 :]  # what is left is free to take the optimum
        if len(rest):
            wanted[:, j + 1 :] -= error[:, None] * torch.linalg.solve(rest, gram[j + 1 :, j])
    error = round_with_feedback(rows, gram, torch.bfloat16).double() - rows
    theirs = wanted - rows
    assert torch.allclose((error @ gram * error).sum(1), (theirs @ gram * theirs).sum(1), rtol=1e-9)
    naive = rows.bfloat16().double() - rows
    assert float((theirs @ gram * theirs).sum()) < float((naive @ gram * naive).sum()) / 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pivoted_coefficients(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    m, n = shape
    weight, right = spectral(m, n, 0), second_moments(n, kind, 1)
    _, metric = kept(shape, None, right)
    assert metric is not None
    found = decompose(weight, right=right)
    exact = truncate(weight, found, RANK, torch.float64, None, *kept(shape, None, right))
    rows, plain, position = pivot(exact.up, exact.down, dtype)
    wanted = weight if m >= n else multiplied(exact)
    fitted = rounded_coefficients(wanted, rows, position, metric, torch.float64).to(dtype)
    ours = rounded_coefficients(wanted, rows, position, metric, dtype)
    of_plain, of_fitted, of_ours = (
        excess(weight, None, right, product(rows, each, position)) for each in (plain, fitted, ours)
    )
    assert of_ours < of_fitted
    assert of_ours < of_plain / (1.3 if kind == "benign" else 5)


def test_the_file_keeps_the_other_diagonal(tmp_path) -> None:  # type: ignore[no-untyped-def]
    weight, left, right = normal(12, 6), second_moments(12, "benign", 1), second_moments(6, "benign", 2)
    store = Decompositions(tmp_path / "d", {})
    full, none = (Target(name, name + ".weight", (12, 6)) for name in ("full", "none"))
    store.save(full, decompose(weight, left=left, right=right), right, left, None)
    store.save(none, decompose(weight, right=right), right, None, None)
    _, inner, outer = load_decomposition(store.path(full), torch.device("cpu"))
    assert torch.equal(inner, right)  # type: ignore[arg-type]
    assert torch.equal(outer, left.diagonal())  # type: ignore[arg-type]
    assert load_decomposition(store.path(none), torch.device("cpu"))[2] is None
    assert "outer" not in load_file(store.path(none))
