"""The routines that come from SciPy's LAPACK, against float64 products and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdconvert.linalg import lapack

DTYPES = [torch.float32, torch.float64]


def eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from(DTYPES), st.booleans())
def test_gram(k: int, depth: int, transposed: bool, dtype: torch.dtype, strided: bool) -> None:
    rows = normal(*((k, depth) if transposed else (depth, k)), dtype=dtype)
    if strided:  # a piece of a wider matrix, and one that lies by columns
        rows = torch.cat([rows, rows], dim=1)[:, : rows.shape[1]] if depth % 2 else rows.T.contiguous().T
    gram = torch.arange(k * k, dtype=dtype).view(k, k)
    before = gram.clone()
    lapack.add_gram(rows, gram, transposed=transposed)
    exact = rows.double() @ rows.double().T if transposed else rows.double().T @ rows.double()
    expected = before.double() + exact
    assert torch.equal(gram.triu(1), before.triu(1))
    assert float((gram.double() - expected).tril().abs().max()) <= 4 * depth * eps(dtype) * float(expected.abs().max())


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(DTYPES), st.integers(0, 5))
def test_top_eigenvectors(k: int, count: int, dtype: torch.dtype, seed: int) -> None:
    count = min(count, k)
    rows = normal(2 * k, k, seed=seed)
    rows[:, : k // 3] *= seed  # zeros and multiples: rank-deficient and clustered spectra
    matrix = (rows.T @ rows).to(dtype)
    lower = matrix.tril() + torch.full((k, k), float("nan"), dtype=dtype).triu(1)
    vectors, work = torch.empty(k, k, dtype=dtype), torch.empty(lapack.work_size(k), dtype=dtype)
    values = lapack.top_eigenvectors(lower, count, vectors, work)
    expected = np.linalg.eigvalsh(matrix.double().numpy())
    norm = max(float(expected[-1]), 1e-30)
    assert float((values.double() - torch.from_numpy(expected)).abs().max()) <= 20 * k * eps(dtype) * norm
    found = vectors[k - count :].double()
    assert float((found @ found.T - torch.eye(count)).abs().max()) <= 50 * k * eps(dtype)
    residual = found @ matrix.double() - values[k - count :, None].double() * found
    assert float(residual.abs().max()) <= 50 * k * eps(dtype) * norm


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(DTYPES))
def test_congruence_and_rows(k: int, count: int, dtype: torch.dtype) -> None:
    rows = normal(2 * k + 1, k, seed=1)
    metric = (rows.T @ rows).to(dtype)
    root = torch.linalg.cholesky((normal(k, k, seed=2).tril() @ normal(k, k, seed=2).tril().T) + torch.eye(k)).to(dtype)
    result = metric.clone()
    lapack.congruence(result, root.contiguous())
    expected = root.double().T @ metric.double() @ root.double()
    scale = float(root.double().norm() ** 2 * metric.double().norm())
    assert float((result.double() - expected).tril().abs().max()) <= 10 * eps(dtype) * scale
    vectors = normal(count, k, dtype=dtype, seed=3)
    product = vectors.clone()
    lapack.multiply_rows(root.contiguous(), product)
    expected = vectors.double() @ root.double().T
    assert float((product.double() - expected).abs().max()) <= 4 * k * eps(dtype) * float(expected.abs().max() + 1)


def test_other_threads_run_meanwhile() -> None:
    """The reader and the writer of a job must not wait for the solver: the lock of the interpreter is given up."""
    import threading

    k = 700
    rows = normal(k, k)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        vectors, work = torch.empty(k, k, dtype=torch.float64), torch.empty(lapack.work_size(k), dtype=torch.float64)
        before = ticks[0]
        lapack.top_eigenvectors((rows.T @ rows).contiguous(), k, vectors, work)
        during = ticks[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 3


def test_threads_are_limited() -> None:
    from threadpoolctl import threadpool_info

    def counts() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with lapack.threads(1):
        assert counts() == {1}
    with lapack.threads(2):
        assert 2 in counts()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_work_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        lapack.top_eigenvectors(
            torch.eye(4, dtype=dtype), 1, torch.empty(4, 4, dtype=dtype), torch.empty(8, dtype=dtype)
        )
