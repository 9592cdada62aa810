"""Corrected prices: what they do to noise, to common effects, and to nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdconvert.factoring.samples import PARTS
from svdconvert.planning.correction import HIGHEST, LEAST, LOWEST, Edge, Place, corrected, edge_of

BLOCKS, KINDS = 8, ("q", "v", "up", "down")
PLACES = {f"layers.{block}.{kind}": Place(block, kind) for block in range(BLOCKS) for kind in KINDS}


def edges(worth: np.ndarray, noise: float | np.ndarray = 0.0, seed: int = 0) -> dict[str, Edge]:
    """Edges of matrices a unit of which is worth so much; each part of the text is off by so much of that."""
    random = np.random.default_rng(seed)
    predicted = 10 ** random.uniform(-6, 0, len(PLACES))
    wrong = np.reshape(noise, (-1, 1)) * random.normal(size=(len(PLACES), PARTS))
    measured = (worth * predicted / PARTS)[:, None] * (1 + wrong)
    return {
        module: Edge(tuple(parts.tolist()), float(p))
        for module, parts, p in zip(PLACES, measured, predicted, strict=True)
    }


def worths(seed: int, common: float, own: float) -> np.ndarray:
    """What a unit is worth: effects of blocks and kinds, and one of each matrix."""
    random = np.random.default_rng(seed)
    blocks, kinds = random.normal(size=BLOCKS), random.normal(size=len(KINDS))
    effects = np.array([blocks[place.block] + kinds[KINDS.index(place.kind)] for place in PLACES.values()])
    return np.exp(common * effects + own * random.normal(size=len(PLACES)))


def logs(prices: dict[str, float]) -> np.ndarray:
    return np.log([prices[module] for module in PLACES])


@settings(max_examples=50)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_a_common_factor_changes_nothing(seed: int, factor: float) -> None:
    """Of the second round too: what counts is what matrices are worth beside each other."""
    worth, other = worths(seed, 0.3, 0.3), edges(worths(seed + 1, 0.3, 0.3), 0.1, seed)
    prices = corrected([other, edges(worth, 0.1, seed)], PLACES)
    assert np.mean(logs(prices)) == pytest.approx(0, abs=1e-9)
    assert logs(corrected([other, edges(worth * factor, 0.1, seed)], PLACES)) == pytest.approx(logs(prices), abs=1e-9)
    assert np.abs(logs(prices)).max() <= np.log(HIGHEST / LOWEST)


@pytest.mark.parametrize(("rounds", "share"), [(1, 3 / 6), (2, 7 / 10), (4, 18 / 21)])
def test_prices_go_a_part_of_the_way(rounds: int, share: float) -> None:
    """What is measured exactly, and always the same: the global budget weighs 3, the rounds 3, 4, 5 and so on."""
    worth = worths(1, 0.2, 0.1)
    wanted = np.log(worth) - np.log(worth).mean()
    assert logs(corrected([edges(worth, seed=i) for i in range(rounds)], PLACES)) == pytest.approx(wanted * share)


def error(found: np.ndarray, worth: np.ndarray) -> float:
    """Of logarithms that were halved, beside those of the truth."""
    return float(np.std(2 * found - np.log(worth)))


def test_noise_is_taken_for_noise() -> None:
    """Parts that disagree count less than what blocks and kinds have in common; the result is nearer to the truth."""
    errors = []
    for seed in range(10):
        worth = worths(seed, 0.2, 0.1)
        measured = edges(worth, np.where(np.arange(len(PLACES)) % 2, 0.1, 1.0), seed)
        believed = {module: Edge((sum(edge.measured) / 2,) * 2, edge.predicted) for module, edge in measured.items()}
        errors.append([error(logs(corrected([each], PLACES)), worth) for each in (measured, believed)])
    assert np.mean(errors, 0)[0] < 0.75 * np.mean(errors, 0)[1]


def test_later_rounds_average_the_noise_of_earlier_ones() -> None:
    worth = worths(0, 0.2, 0.2)
    wanted = np.log(worth) - np.log(worth).mean()
    errors = []
    for rounds, share in ((1, 3 / 6), (6, 33 / 36)):
        several = ([edges(worth, 1.0, seed + i) for i in range(rounds)] for seed in range(0, 60, 6))
        errors.append(np.std([logs(corrected(measured, PLACES)) / share - wanted for measured in several]))
    assert errors[1] < 0.7 * errors[0]


def test_what_cannot_be_measured() -> None:
    """Nothing predicted, directions that do harm, and a model that is better without any of them."""
    worth = np.ones(len(PLACES))
    found = edges(worth)
    one, other, *_ = found
    found[one] = Edge((0.0,) * PARTS, 0.0)
    found[other] = Edge(tuple(-part for part in found[other].measured), found[other].predicted)
    prices = corrected([found], PLACES)
    assert np.isfinite(logs(prices)).all()
    assert prices[other] < min(price for module, price in prices.items() if module != other)
    assert logs(corrected([edges(-worth)], PLACES)) == pytest.approx(0)
    assert logs(corrected([{m: Edge((0.0, 0.0), 0.0) for m in PLACES}], PLACES)) == pytest.approx(0)


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_windows(rank: int, more: int) -> None:
    start, stop = edge_of(rank, rank + more)
    assert 0 <= start < rank <= stop <= rank + more
    assert stop - rank == min(more, max(LEAST, int(0.15 * rank)))
    assert edge_of(None, rank) == edge_of(rank, rank)
