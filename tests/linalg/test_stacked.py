"""Stacks of matrices against the solver that does one at a time, on the CPU and on a device that is not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accelerator import DEVICE, device_reads, on_host
from support.matrices import excess, matrix, power_law

from svdconvert.errors import InputError
from svdconvert.factoring.stacks import STACK_BYTES, STACK_SIDE, begin, in_units
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.stacked import factorize_stack, settle
from svdconvert.machine.lanes import Lanes
from svdconvert.planning.steps import Step
from svdconvert.tensors import TensorInfo

SHAPES = [(96, 96), (288, 96), (96, 384), (200, 130)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def stack(shape: tuple[int, int], exponents: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    k = min(shape)
    return torch.stack([matrix(*shape, power_law(k, a), seed) for seed, a in enumerate(exponents)]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_the_solver(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdconvert.linalg.stacked.PANEL", 64)
    weights = stack(shape, [0.0, 0.3, 0.5, 0.8], dtype)
    for rank in (1, 20, 60):
        found = factorize_stack(weights, rank, dtype)
        for weight, factors in zip(weights, settle(weights, found, found.facts), strict=True):
            alone = factorize(weight, rank, dtype)
            assert factors is not None
            assert factors.down.dtype == factors.up.dtype == dtype
            assert factors.down.is_contiguous()
            assert factors.up.is_contiguous()
            for name in ("relative_error", "optimal_error", "metric_error"):
                assert getattr(factors, name) == pytest.approx(getattr(alone, name), rel=5e-5), name
            assert factors.metric_loss == pytest.approx(alone.metric_loss, rel=5e-5)
            assert factors.rounding_excess == pytest.approx(alone.rounding_excess, rel=0.2, abs=5e-5)
            assert (factors.basis, factors.precision) == (alone.basis, alone.precision)
            if dtype == torch.float32:
                assert -1e-6 <= excess(weight, factors.down, factors.up) <= 1e-5


@settings(max_examples=25)
@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 40),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 10**6),
    true_rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_never_worse_than_the_optimum_and_rounding(
    rows: int, columns: int, share: float, seed: int, true_rank: int, dtype: torch.dtype
) -> None:
    """Also where the matrix has fewer dimensions than the rank that is asked for."""
    k = min(rows, columns)
    rank = max(1, round(share * k))
    spectrum = torch.where(torch.arange(k) < true_rank, power_law(k, 0.5), 0)
    weights = torch.stack([matrix(rows, columns, spectrum, seed + i) for i in range(3)]).to(dtype)
    found = factorize_stack(weights, rank, dtype)
    for weight, factors in zip(weights, settle(weights, found, found.facts), strict=True):
        factors = factors or factorize(weight, rank, dtype)
        exact = weight.double()
        least = float(torch.linalg.svdvals(exact)[rank:].square().sum().sqrt() / exact.norm())
        true = float((exact - factors.up.double() @ factors.down.double()).norm() / exact.norm())
        assert factors.relative_error == pytest.approx(true, rel=1e-3, abs=2e-6)
        assert least - 1e-6 <= true <= least + 4 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("what", ["NaN", "infinite", "too large", "too small", "range of singular values"])
def test_what_asks_for_more_is_left_to_the_solver(what: str) -> None:
    """And the others of the stack are not."""
    weights = stack((96, 64), [0.3, 0.3, 0.3], torch.float32)
    if what == "NaN":
        weights[1, 5, 7] = float("nan")
    elif what == "infinite":
        weights[1, 5, 7] = float("inf")
    elif what == "too large":
        weights[1] *= 1e30
    elif what == "too small":
        weights[1] *= 1e-30
    else:
        weights[1] = matrix(96, 64, torch.cat([torch.tensor([1e4]), power_law(63, 0.3)])).float()
    found = factorize_stack(weights, 20, torch.float32)
    first, second, third = settle(weights, found, found.facts)
    assert first is not None
    assert third is not None
    assert second is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["vectors", "values", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_wrong_eigenvectors_are_found_out(
    shape: tuple[int, int], wrong: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a batched eigensolver has returned them at times: the diagonal and the unit matrix, or anything else."""
    real = torch.linalg.eigh

    def eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        diagonal = gram[1].diagonal().clone()
        values, vectors = real(gram)
        order = diagonal.argsort()
        if wrong != "values":
            vectors[1] = torch.eye(len(diagonal))[:, order]
        if wrong != "vectors":
            values[1] = diagonal[order] if wrong == "both" else values[1] * 1.01
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    weights = stack(shape, [0.3, 0.5, 0.8], dtype)
    found = factorize_stack(weights, 24, dtype)
    settled = settle(weights, found, found.facts)
    assert [factors is None for factors in settled] == [False, True, False]


def test_zeros() -> None:
    weights = torch.zeros(2, 40, 30)
    weights[1] = matrix(40, 30, power_law(30, 0.5)).float()
    found = factorize_stack(weights, 10, torch.float16)
    nothing, something = settle(weights, found, found.facts)
    assert nothing is not None
    assert something is not None
    assert nothing.relative_error == nothing.optimal_error == 0
    assert not nothing.up.any()
    assert something.relative_error > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_host_looks_at_nothing(shape: tuple[int, int]) -> None:
    weights = stack(shape, [0.3, 0.5], torch.float16)
    here = factorize_stack(weights, 20, torch.float16)
    with device_reads() as reads:
        there = factorize_stack(weights.to(DEVICE), 20, torch.float16)
        assert reads == []
        facts = there.facts.cpu()
        assert len(reads) == 1
    assert torch.allclose(on_host(facts), here.facts, rtol=1e-5)
    products = [on_host(found.up).double() @ on_host(found.down).double() for found in (here, there)]
    assert torch.allclose(*products, atol=1e-3 * float(products[0].abs().max()))


def step(key: str, shape: tuple[int, int], rank: int = 8, file: str = "a", **options: object) -> Step:
    m, n = shape
    info = TensorInfo(key, "F16", shape, file, 0)
    outputs = (TensorInfo(f"{key}.down", "F16", (rank, n), "", 0), TensorInfo(f"{key}.up", "F16", (m, rank), "", 0))
    kind = str(options.pop("kind", "factorize"))
    return Step(kind, key, (info,), outputs, {"rank": rank, "layout": "balanced", **options})


def test_units() -> None:
    steps = [
        step("one", (64, 32)),
        step("two", (32, 64)),
        step("three", (64, 32)),
        step("another rank", (64, 32), rank=9),
        step("another file", (64, 32), file="b"),
        step("another layout", (64, 32), layout="pivoted"),
        step("a copy", (64, 32), kind="copy"),
        step("four", (64, 32)),
        step("other way round", (64, 32), transposed=True),
    ]
    keys = [[step.key for step in unit] for unit in in_units(steps, DEVICE)]
    others = [["another rank"], ["another file"], ["another layout"], ["a copy"], ["other way round"]]
    assert keys == [["one", "three", "four"], ["two"], *others]
    assert in_units(steps, torch.device("cpu")) == [(each,) for each in steps]


def test_large_matrices_are_by_themselves() -> None:
    side = STACK_SIDE
    large = [step(str(i), (2 * side, side + 1)) for i in range(3)]
    assert [len(unit) for unit in in_units(large, DEVICE)] == [1, 1, 1]
    fitting = STACK_BYTES // (2 * 4 * side * side)
    some = [step(str(i), (4 * side, side)) for i in range(2 * fitting + 1)]
    assert [len(unit) for unit in in_units(some, DEVICE)] == [fitting, fitting, 1]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_unit_gives_what_its_steps_give(transposed: bool) -> None:
    weights = stack((96, 64), [0.3, 0.8, 0.5], torch.float16)
    wide = matrix(96, 64, torch.cat([torch.tensor([1e4]), power_law(63, 0.3)])).half()
    weights = torch.cat([weights, wide[None]])
    stored = [weight.T.contiguous() if transposed else weight for weight in weights]
    unit = [step(f"w{i}", (96, 64), rank=16, transposed=transposed) for i in range(4)]
    alone = [
        begin([each], [[weight]], Workspace(), Lanes(torch.device("cpu")))()[0]
        for each, weight in zip(unit, stored, strict=True)
    ]
    with device_reads() as reads:
        inputs = [[weight.to(DEVICE)] for weight in stored]
        finish = begin(unit, inputs, Workspace(), Lanes(DEVICE))
        assert len(reads) == 3  # the results, which these lanes bring at once
        together = finish()
    for (tensors, report), (expected, wanted) in zip(together, alone, strict=True):
        assert report.keys() == wanted.keys()
        assert report["precision"] == wanted["precision"]
        assert report["relative_error"] == pytest.approx(wanted["relative_error"], rel=1e-4)
        ours, theirs = (up.double() @ down.double() for down, up in (map(on_host, tensors), expected))
        assert torch.allclose(ours, theirs, atol=2e-3 * float(theirs.abs().max()))
    assert [report["precision"] for _, report in together] == ["float32"] * 3 + ["float64"]


def test_a_bad_matrix_of_a_unit_is_named() -> None:
    weights = stack((96, 64), [0.3, 0.8], torch.float16)
    weights[1, 3, 4] = float("nan")
    unit = [step(f"w{i}", (96, 64), rank=16) for i in range(2)]
    with device_reads():
        finish = begin(unit, [[weight.to(DEVICE)] for weight in weights], Workspace(), Lanes(DEVICE))
        with pytest.raises(InputError, match="tensor w1 cannot be converted: it has NaN or infinite entries"):
            finish()
