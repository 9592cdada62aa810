"""The filtered subspace: what it certifies is as near the optimum as it says, and the rest it leaves to the solver."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdconvert.errors import InputError

from .chebyshev import BOUND, _filter, excess_estimate, filtered_factors
from .filtered import squared_singular_values
from .geometry import Weights
from .measure import ROOT
from .solver import error

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


def excess(weight: Tensor, rank: int, down: Tensor, up: Tensor) -> float:
    return error(weight, down, up) / float(squared_singular_values(weight)[:-rank].sum().sqrt()) - 1


@settings(deadline=None, max_examples=60)
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
    found = filtered_factors(weight, rank, degree=degree, passes=passes)
    if found is None:
        return
    down, up, certificate = found
    assert down.shape == (rank, columns)
    assert up.shape == (rows, rank)
    assert certificate <= BOUND
    assert excess(weight, rank, down, up) <= (2 if degree else 1) * BOUND


@pytest.mark.parametrize("shape", [(768, 384), (384, 384), (384, 1536)])
@pytest.mark.parametrize("rank", [4, 48, 96])
@pytest.mark.parametrize("spectrum", ["llm", "gauss", "power"])
def test_layers_are_certified(spectrum: str, rank: int, shape: tuple[int, int]) -> None:
    """None of the benchmark's ordinary layers has to be done again, and no certificate is far from the truth."""
    weight = Weights(spectrum).matrix(shape, "layer")
    found = filtered_factors(weight, rank)
    assert found is not None
    true = excess(weight, rank, *found[:2])
    assert true <= found[2] <= 5 * true + 1e-5


@pytest.mark.parametrize("scale", [1e-5, 1e4])
def test_scale(scale: float) -> None:
    """Neither the squares of large entries nor those of small ones leave float32's range, and factors are balanced."""
    weight = matrix("power law", 256, 128).float() * scale**4
    found = filtered_factors(weight, 8)
    assert found is not None
    down, up, certificate = found
    assert excess(weight, 8, down, up) <= certificate + 1e-5
    assert float(down.norm() / up.norm()) == pytest.approx(1, abs=0.01)


def test_weak_filter_is_not_certified() -> None:
    """So that a certificate is not what everything gets."""
    weight = Weights("gauss").matrix((512, 256), "layer")
    assert filtered_factors(weight, 32, degree=1, passes=1) is None


def test_second_filter_makes_good() -> None:
    weight = Weights("gauss").matrix((512, 256), "layer")
    assert filtered_factors(weight, 64, degree=2, passes=1) is None
    found = filtered_factors(weight, 64, degree=2, passes=4)
    assert found is not None
    assert excess(weight, 64, *found[:2]) <= found[2]


def test_left_to_the_exact_solver() -> None:
    """Dynamic range beyond float32, dependent columns, zeros, no error to compare with, and ranks that are too high."""
    outlier = matrix("linear", 256, 200).float()
    outlier[0, 0] += 1e3
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(256, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    assert filtered_factors(outlier, 16) is None
    assert filtered_factors(thin.half(), 16) is None
    assert filtered_factors(thin.half(), 8) is None
    assert filtered_factors(torch.zeros(256, 200), 16) is None
    assert filtered_factors(matrix("linear", 256, 200), 100) is None


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_low_rank(noise: float) -> None:
    """An error so small beside the matrix that float32 cannot tell its excess is not vouched for."""
    left, right = (
        torch.linalg.qr(torch.randn(200, 200, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1)
    )
    weight = (left * torch.where(torch.arange(200) < 16, 1.0, noise)) @ right.T
    found = filtered_factors(weight, 16)
    assert (found is not None) == (noise > 1e-3)
    if found is not None:
        assert excess(weight, 16, *found[:2]) <= found[2] + 1e-5


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
        filtered_factors(weight, 16)


def test_large_growth() -> None:
    """Values just within float32's range grow by 1e4 in one step: Cholesky fails there, Householder's QR does not."""
    weight = matrix("outliers in float32", 400, 300)
    found = filtered_factors(weight, 32)
    assert found is not None
    assert excess(weight, 32, *found[:2]) <= found[2] + 1e-5


@settings(deadline=None)
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


def test_benchmark(tmp_path: Path) -> None:
    options = ["--hidden", "160", "--ranks", "8", "0", "--spectrum", "gauss", "steep", "--repeats", "1"]
    line = [sys.executable, "-m", "tests.benchmarks.filtered", *options, "--out", str(tmp_path)]
    subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
    rows = json.loads((tmp_path / "filtered.json").read_text())["matrices"]
    assert len(rows) == 2 * 4 * 2
    assert {row["certified"] for row in rows if row["spectrum"] == "gauss"} == {True}
    for row in rows:
        assert row["excess"] <= (row["certificate"] or 0) + 1e-5
        assert row["certified"] == (row["certificate"] is not None)
        assert min(row["exact_s"], row["filtered_s"]) > 0
    assert "2048" not in (tmp_path / "filtered.md").read_text().splitlines()[4]
