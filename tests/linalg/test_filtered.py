"""The filtered subspace: what it certifies is as near the optimum as it says, and the rest it leaves to the solver."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.filtered import BOUND, _filter, excess_estimate, factorize_fast, filtered_factors
from svdconvert.linalg.results import Factors
from tests.benchmarks.filtered import squared_singular_values
from tests.benchmarks.geometry import Weights
from tests.benchmarks.solver import error

# Place of a singular value among all, from 0 to 1 -> its size.
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "slow power law": lambda i: (1 + 100 * i) ** -0.3,
    "power law": lambda i: (1 + 100 * i) ** -0.8,
    "linear": lambda i: 1 - 0.9 * i,
    "two clusters": lambda i: torch.where(i < 0.1, 1.0, 0.5),
    "clusters that are close": lambda i: torch.where(i < 0.1, 1.0, 0.98),
    "outliers": lambda i: torch.where(i < 0.02, 1.0, 0.1 - 0.05 * i),
    "outliers in float32": lambda i: torch.where(i < 0.01, 40.0, 1 - 0.5 * i),
    "staircase": lambda i: 0.7 ** torch.floor(20 * i),
}


def matrix(spectrum: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """[rows, columns] in float16, of given singular values but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, k, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, k, generator=generator))
    return ((left * SPECTRA[spectrum](torch.arange(k) / k)) @ right.T).half()


def excess(weight: Tensor, rank: int, found: Factors) -> float:
    return error(weight, found.down, found.up) / float(squared_singular_values(weight)[:-rank].sum().sqrt()) - 1


def certificate(found: Factors) -> float:
    assert found.certificate is not None
    return found.certificate


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SPECTRA)),
    st.integers(128, 300),
    st.integers(128, 300),
    st.integers(1, 60),
    st.integers(0, 8),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_certified_is_near(
    spectrum: str, rows: int, columns: int, rank: int, degree: int, passes: int, seed: int
) -> None:
    """With the filters that are used; with weaker ones the estimate is less sharp, but not far off either."""
    weight = matrix(spectrum, rows, columns, seed)
    found = filtered_factors(weight, rank, torch.float32, degree=degree, passes=passes)
    if found is None:
        return
    assert found.down.shape == (rank, columns)
    assert found.up.shape == (rows, rank)
    assert certificate(found) <= BOUND
    assert excess(weight, rank, found) <= (2 if degree else 1) * BOUND


@pytest.mark.parametrize("shape", [(768, 384), (384, 384), (384, 1536)])
@pytest.mark.parametrize("rank", [4, 48, 96])
@pytest.mark.parametrize("spectrum", ["llm", "gauss", "power"])
def test_layers_are_certified(spectrum: str, rank: int, shape: tuple[int, int]) -> None:
    """None of the benchmark's ordinary layers has to be done again, and no certificate is far from the truth."""
    weight = Weights(spectrum).matrix(shape, "layer")
    found = filtered_factors(weight, rank, torch.float32)
    assert found is not None
    true = excess(weight, rank, found)
    assert true <= certificate(found) <= 5 * true + 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_told(dtype: torch.dtype) -> None:
    """The error of the factors as they are stored, and no more than the optimum as the least error."""
    weight = Weights("llm").matrix((768, 384), "layer")
    found = filtered_factors(weight, 32, dtype)
    assert found is not None
    values = squared_singular_values(weight)
    norm, best = float(values.sum().sqrt()), float(values[:-32].sum().sqrt())
    assert found.relative_error == pytest.approx(error(weight, found.down, found.up) / norm, rel=1e-4)
    assert found.optimal_error <= best / norm * (1 + 1e-6)
    assert found.optimal_error >= best / norm / (1 + certificate(found)) * (1 - 1e-6)
    assert {found.down.dtype, found.up.dtype} == {dtype}
    assert found.precision == "float32"


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_scale(scale: float) -> None:
    """Neither the squares of large entries nor those of small ones leave float32's range, and factors are balanced."""
    weight = matrix("power law", 256, 128).float() * scale**4
    found = filtered_factors(weight, 8, torch.float32)
    assert found is not None
    assert excess(weight, 8, found) <= certificate(found) + 1e-5
    assert float(found.down.norm() / found.up.norm()) == pytest.approx(1, abs=0.01)


def test_weak_filter_is_not_certified() -> None:
    """So that a certificate is not what everything gets."""
    weight = Weights("gauss").matrix((512, 256), "layer")
    assert filtered_factors(weight, 32, torch.float32, degree=1, passes=1) is None


def test_second_filter_makes_good() -> None:
    weight = Weights("gauss").matrix((512, 256), "layer")
    assert filtered_factors(weight, 64, torch.float32, degree=2, passes=1) is None
    found = filtered_factors(weight, 64, torch.float32, degree=2, passes=4)
    assert found is not None
    assert excess(weight, 64, found) <= certificate(found)


def test_left_to_the_exact_solver() -> None:
    """Dynamic range beyond float32, dependent columns, zeros, no error to compare with, and ranks that are too high."""
    outlier = matrix("linear", 256, 200).float()
    outlier[0, 0] += 1e3
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(256, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    cases = [(outlier, 16), (thin.half(), 16), (thin.half(), 8), (torch.zeros(256, 200), 16)]
    for weight, rank in [*cases, (matrix("linear", 256, 200), 100)]:
        assert filtered_factors(weight, rank, torch.float32) is None
        one, other = factorize_fast(weight, rank, torch.float32), factorize(weight, rank, torch.float32)
        assert torch.equal(one.down, other.down)
        assert torch.equal(one.up, other.up)
        assert one.certificate is None
        assert one.optimal_error == other.optimal_error


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_low_rank(noise: float) -> None:
    """An error so small beside the matrix that float32 cannot tell its excess is not vouched for."""
    left, right = (
        torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1)
    )
    weight = (left * torch.where(torch.arange(200) < 16, 1.0, noise)) @ right.T
    found = filtered_factors(weight, 16, torch.float32)
    assert (found is not None) == (noise > 1e-3)
    if found is not None:
        assert excess(weight, 16, found) <= certificate(found) + 1e-5


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("largest", [3.0, 60.0])
def test_filter(degree: int, largest: float) -> None:
    """The columns span those of Chebyshev's polynomial, whether or not they were made orthonormal on the way."""
    values = torch.linspace(0, largest, 50, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    polynomial = torch.special.chebyshev_polynomial_t(2 * values - 1, torch.tensor(degree))
    expected = torch.linalg.qr(polynomial[:, None] * basis)[0]
    gram = values.diag().float()
    columns = _filter(gram, basis.float(), gram @ basis.float(), 1.0, largest, degree).double()
    columns = torch.linalg.qr(columns)[0]
    assert float((columns - expected @ (expected.T @ columns)).norm()) < 1e-3


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_not_finite(wrong: float) -> None:
    weight = matrix("linear", 256, 200)
    weight[3, 5] = wrong
    with pytest.raises(InputError, match="NaN or infinite"):
        factorize_fast(weight, 16, torch.float32)


def test_large_growth() -> None:
    """Values just within float32's range grow by 1e4 in one step: Cholesky fails there, Householder's QR does not."""
    weight = matrix("outliers in float32", 400, 300)
    found = filtered_factors(weight, 32, torch.float32)
    assert found is not None
    assert excess(weight, 32, found) <= certificate(found) + 1e-5


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
def test_ends_of_the_range(largest: float) -> None:
    """What float32 can hold gives what the exact solver gives, an error included."""
    weight = matrix("power law", 256, 200).float()
    weight = (weight / weight.abs().max()).double().mul(largest).float()
    results = []
    for solve in (factorize, factorize_fast):
        try:
            results.append(solve(weight, 16, torch.float32).relative_error)
        except InputError as wrong:
            results.append(str(wrong))
    assert results[0] == (results[1] if isinstance(results[1], str) else pytest.approx(results[1], rel=2e-3))


def test_random_numbers_of_the_program_play_no_part() -> None:
    weight = Weights("gauss").matrix((512, 256), "layer")
    torch.manual_seed(1)
    one, before = factorize_fast(weight, 16, torch.float16), torch.get_rng_state()
    assert torch.equal(before, torch.manual_seed(1).get_state())
    torch.manual_seed(2)
    other = factorize_fast(weight, 16, torch.float16)
    assert one.certificate is not None
    assert torch.equal(one.down, other.down)
    assert torch.equal(one.up, other.up)


@given(st.integers(2, 12), st.integers(0, 99))
def test_estimate_of_two_by_two(size: int, seed: int) -> None:
    """Where every vector is coupled to one of the rest, which lies at the floor, the estimate is exact."""
    generator = torch.Generator().manual_seed(seed)
    top = 1 + torch.rand(size, generator=generator, dtype=torch.float64)
    coupling = torch.rand(size, generator=generator, dtype=torch.float64)
    pairs = torch.stack([torch.stack([top, coupling]), torch.stack([coupling, torch.ones_like(top)])]).permute(2, 0, 1)
    largest = torch.linalg.eigvalsh(pairs)[:, 1]
    tail = 10.0 * size
    expected = math.sqrt(tail / (tail - float((largest - top).sum()))) - 1
    assert excess_estimate(top, coupling.square(), 1.0, tail) == pytest.approx(expected, rel=1e-9)
    assert excess_estimate(top, coupling.square() * 1e9, 1.0, tail) == math.inf
