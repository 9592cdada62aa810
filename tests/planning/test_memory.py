"""The estimate of memory, term by term; that it fits what is measured is said in docs/measurements.md."""

from __future__ import annotations

from svdconvert.planning.memory import BASE_BYTES, SolvedMatrix, decomposition_bytes, device_bytes, host_bytes

SMALL = SolvedMatrix(side=10, rank=2, read=400, written=100)
LARGE = SolvedMatrix(side=100, rank=2, read=40_000, written=10_000)


def test_nothing_to_factor() -> None:
    assert host_bytes([], 4) == BASE_BYTES
    assert device_bytes([], 4) == 0


def test_the_largest_matrix_counts() -> None:
    assert host_bytes([SMALL, LARGE], 1) == host_bytes([LARGE], 1) > host_bytes([SMALL], 1)
    assert device_bytes([SMALL, LARGE], 1) == device_bytes([LARGE], 1) > device_bytes([SMALL], 1)


def test_terms_on_the_host() -> None:
    waiting = 400 + 2 * 100
    # the matrix and its result, three 10 x 10 and four 10 x 2 arrays in float32
    worker = 400 + 100 + 3 * 4 * 10 * 10 + 4 * 4 * 10 * 2
    assert host_bytes([SMALL], 1) - BASE_BYTES == waiting + worker
    assert host_bytes([SMALL], 3) - host_bytes([SMALL], 1) == 2 * worker
    stacked = SolvedMatrix(side=10, rank=2, read=400, written=100, stacked=True)
    assert host_bytes([stacked], 1) - host_bytes([SMALL], 1) == 400


def test_terms_on_a_gpu() -> None:
    worker = 3 * 400 + 2 * 100 + 5 * 8 * 10 * 10
    assert device_bytes([SMALL], 1) == 400 + worker
    assert device_bytes([SMALL], 3) - device_bytes([SMALL], 1) == 2 * worker


def test_decompositions_are_in_float64() -> None:
    assert decomposition_bytes([10, 100], 2) == 2 * 3 * 8 * 100 * 100
    assert decomposition_bytes([10, 100], 2, on_gpu=True) == 3 * decomposition_bytes([10, 100], 2)
