"""Corrected prices: what they do to noise, to common effects, and to nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdconvert.planning.correction import HIGHEST, LEAST, LOWEST, Edge, Place, corrected, edge_of

BLOCKS, KINDS = 8, ("q", "v", "up", "down")
PLACES = {f"layers.{block}.{kind}": Place(block, kind) for block in range(BLOCKS) for kind in KINDS}


def edges(worth: np.ndarray, noise: float = 0.0, seed: int = 0) -> dict[str, Edge]:
    """Edges of matrices a unit of which is worth so much, in halves that are off by so much."""
    random = np.random.default_rng(seed)
    predicted = 10 ** random.uniform(-6, 0, len(PLACES))
    halves = [worth * predicted / 2 * np.exp(noise * random.normal(size=len(worth))) for _ in range(2)]
    return {
        module: Edge((float(a), float(b)), float(p)) for module, a, b, p in zip(PLACES, *halves, predicted, strict=True)
    }


def worths(seed: int, common: float, own: float) -> np.ndarray:
    """What a unit is worth: effects of blocks and kinds, and one of each matrix."""
    random = np.random.default_rng(seed)
    blocks, kinds = random.normal(size=BLOCKS), random.normal(size=len(KINDS))
    effects = np.array([blocks[place.block] + kinds[KINDS.index(place.kind)] for place in PLACES.values()])
    return np.exp(common * effects + own * random.normal(size=len(PLACES)))


def logs(prices: dict[str, float]) -> np.ndarray:
    return np.log([prices[module] for module in PLACES])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_a_common_factor_changes_nothing(seed: int, factor: float) -> None:
    worth = worths(seed, 0.3, 0.3)
    prices = corrected({}, edges(worth, 0.1, seed), PLACES)
    assert np.mean(logs(prices)) == pytest.approx(0, abs=1e-9)
    assert logs(corrected({}, edges(worth * factor, 0.1, seed), PLACES)) == pytest.approx(logs(prices), abs=1e-9)
    assert np.abs(logs(prices)).max() <= np.log(HIGHEST / LOWEST)


def test_prices_move_a_part_of_the_way_to_what_is_measured() -> None:
    worth = worths(1, 0.3, 0.2)
    wanted = np.log(worth) - np.log(worth).mean()
    first = corrected({}, edges(worth), PLACES)
    assert logs(first) == pytest.approx(wanted / 2, abs=0.01)
    second = corrected(first, edges(worth), PLACES)
    assert logs(second) == pytest.approx(wanted * 3 / 4, abs=0.01)
    assert logs(corrected(first, edges(worth), PLACES, damping=0.0)) == pytest.approx(logs(first), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_taken_for_noise(seed: int) -> None:
    """Where the halves disagree, what blocks and kinds have in common counts; the result is nearer to the truth."""
    worth = worths(seed, 0.4, 0.05)
    wanted = np.log(worth) - np.log(worth).mean()
    measured = edges(worth, 0.5, seed)
    raw = np.log([sum(edge.measured) / edge.predicted for edge in measured.values()])
    found = logs(corrected({}, measured, PLACES, damping=1.0))
    assert np.std(found - wanted) < 0.75 * np.std(raw - raw.mean() - wanted)


def test_what_cannot_be_measured() -> None:
    """Nothing predicted, directions that do harm, and a model that is better without any of them."""
    worth = np.ones(len(PLACES))
    found = edges(worth)
    one, other, *_ = found
    found[one] = Edge((0.0, 0.0), 0.0)
    found[other] = Edge((-1.0, -1.0), found[other].predicted)
    prices = corrected({}, found, PLACES)
    assert np.isfinite(logs(prices)).all()
    assert prices[other] < min(price for module, price in prices.items() if module != other)
    assert logs(corrected({}, edges(-worth), PLACES)) == pytest.approx(0)
    assert logs(corrected({}, {m: Edge((0.0, 0.0), 0.0) for m in PLACES}, PLACES)) == pytest.approx(0)


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_windows(rank: int, more: int) -> None:
    start, stop = edge_of(rank, rank + more)
    assert 0 <= start < rank <= stop <= rank + more
    assert stop - rank == min(more, max(LEAST, int(0.15 * rank)))
    assert edge_of(None, rank) == edge_of(rank, rank)
