"""The search for the smallest size against going through all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from svdconvert.planning.size_search import STEPS, Bounds, smallest


def searched(lost, limit: float, **options):
    asked: list[int] = []

    def measure(step: int) -> float:
        asked.append(step)
        return lost[step]

    return smallest(measure, limit, **options), asked


@settings(max_examples=300)
@given(
    st.integers(0, 10_000),
    st.integers(0, STEPS),
    st.floats(1e-4, 1e3),
)
@example(0, STEPS, 1e-3)
def test_the_smallest_of_all(seed: int, impossible: int, limit: float) -> None:
    """Whatever falls, and whatever cannot be made below some size."""
    random = np.random.default_rng(seed)
    values = np.sort(10 ** random.uniform(-4, 3, STEPS + 1) * random.uniform(-0.2, 1, STEPS + 1))[::-1].tolist()
    values[:impossible] = [math.inf] * impossible
    bounds, asked = searched(values, limit)
    fitting = [step for step in range(1, STEPS) if values[step] <= limit]
    assert bounds == Bounds(min(fitting, default=STEPS) - 1, min(fitting, default=STEPS))
    assert len(set(asked)) == len(asked)
    assert all(0 < step < STEPS for step in asked)


@pytest.mark.parametrize("limit", [1e-3, 0.05, 0.5, 2.0])
@pytest.mark.parametrize("power", [1.5, 3.0])
def test_few_measurements(limit: float, power: float) -> None:
    """Curves as they are measured: a power of what is cut off, and steeper where little is kept."""
    shares = np.arange(STEPS + 1) / STEPS
    lost = 4 * (1 - shares) ** power * np.exp(3 * (1 - shares) ** 2)
    bounds, asked = searched(lost.tolist(), limit)
    assert lost[bounds.high] <= limit < lost[bounds.low]
    assert len(asked) <= 7


def test_known_bounds_are_not_measured_again() -> None:
    lost = [10.0 - step / 20 for step in range(STEPS + 1)]
    bounds, asked = searched(lost, 5.0, first=110, bounds=Bounds(0, 112))
    assert bounds == Bounds(99, 100)
    assert max(asked) <= 111
