"""Prices of a global budget, corrected by what single directions are worth at the compressed model.

A global budget (``planning/allocation.py``) buys directions by their squared singular values, as if each unit of them
were worth the same in every matrix. What is measured around the edge of each matrix says what a unit is really worth
there, but noisily, and only for small changes of the ranks. So the ranks are corrected round by round, by the mean of
all measurements so far, in which later ones, made nearer to the final ranks, weigh more. Each mean is pulled towards
the sum of what the matrices of its block and those of its kind have in common, as far as the parts of the text disagree
(empirical Bayes; Efron and Morris, 1975), and the price goes less than the whole way from 1 to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Corrections of a budget, one after the other.
ROUNDS = 6
# Directions on each side of the edge, as a share of the rank, and how many at least.
WINDOW, LEAST = 0.15, 4
# What a unit is worth in a matrix counts between these multiples of the median.
LOWEST, HIGHEST = 0.2, 5.0
# What pulls the effects of blocks and kinds towards zero, beside one for each matrix that has them.
_RIDGE = 1e-2


@dataclass(frozen=True)
class Edge:
    """What the directions around the edge of a truncation are worth together.

    Attributes:
        measured: what KL falls by to first order, in nats per token, as a sum over equal parts of the text, at least 2.
        predicted: the sum of their squared singular values.
    """

    measured: tuple[float, ...]
    predicted: float


@dataclass(frozen=True)
class Place:
    """Where a matrix is in the model.

    Attributes:
        block: number of its block.
        kind: its name within the block.
    """

    block: int
    kind: str


def edge_of(rank: int | None, full: int) -> tuple[int, int]:
    """The directions around the edge of a truncation, from the first to behind the last.

    Args:
        rank: directions that are kept; None for all.
        full: how many there are.
    """
    rank = full if rank is None else rank
    width = max(LEAST, int(WINDOW * rank))
    return max(rank - width, 0), min(rank + width, full)


def corrected(rounds: Sequence[Mapping[str, Edge]], places: Mapping[str, Place]) -> dict[str, float]:
    """Prices, what squared singular values are to be multiplied with.

    Args:
        rounds: what was measured so far, round by round, each at the ranks that the rounds before it led to.
        places: where the modules are.

    Returns:
        Module path -> price; their geometric mean is 1.
    """
    modules = list(places)
    found = [_ratios([edges[module] for module in modules]) for edges in rounds]
    # The rounds weigh 3, 4, 5 and so on; the global budget, whose prices are 1, weighs as much as the first one.
    weights = np.arange(len(rounds)) + 3.0
    share = weights / weights.sum()
    ratios = sum(part * one for part, (one, _) in zip(share, found, strict=True))
    noise = sum(part**2 * one for part, (_, one) in zip(share, found, strict=True))
    logs = np.log(_believed(ratios, noise, [places[module] for module in modules]))
    logs *= weights.sum() / (3 + weights.sum())
    return dict(zip(modules, np.exp(logs - logs.mean()).tolist(), strict=True))


def _ratios(edges: Sequence[Edge]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a unit is worth in each matrix, beside the median, and the variance of that."""
    predicted = np.array([edge.predicted for edge in edges])
    seen = predicted > 0
    parts = np.array([edge.measured for edge in edges]) / np.where(seen, predicted, np.inf)[:, None]
    median = float(np.median(parts.sum(1)[seen])) if seen.any() else 0.0
    if not median > 0:  # more directions do harm than good: nothing to go by
        return np.ones(len(edges)), np.zeros(len(edges))
    return np.where(seen, parts.sum(1) / median, 1.0), parts.shape[1] * np.var(parts / median, axis=1, ddof=1)


def _believed(ratios: NDArray[np.float64], noise: NDArray[np.float64], places: Sequence[Place]) -> NDArray[np.float64]:
    """Ratios without most of their noise, and bounded."""
    common = _effects(places) @ np.clip(ratios, -HIGHEST, HIGHEST)
    own = ratios - common
    spread = _spread(own, noise)
    kept = np.divide(spread, spread + noise, out=np.zeros_like(noise), where=spread + noise > 0)
    return np.clip(np.clip(common, LOWEST, HIGHEST) + kept * own, LOWEST, HIGHEST)


def _spread(values: NDArray[np.float64], noise: NDArray[np.float64]) -> float:
    """The variance of values without their noise, with which their squares are as expected (Paule and Mandel, 1982)."""
    low, high = 0.0, float(np.max(values**2))
    for _ in range(60):
        middle = (low + high) / 2
        total = noise + middle
        squares = np.divide(values**2, total, out=np.zeros_like(total), where=total > 0)
        low, high = (middle, high) if float(np.mean(squares)) > 1 else (low, middle)
    return high


def _effects(places: Sequence[Place]) -> NDArray[np.float64]:
    """[n, n]: ratios -> the sums of the effects of block and kind that fit them best (ridge regression)."""
    levels = [sorted({(name, getattr(place, name)) for place in places}) for name in ("block", "kind")]
    columns = {level: i for i, level in enumerate([*levels[0], *levels[1]])}
    design = np.zeros((len(places), len(columns)))
    for i, place in enumerate(places):
        design[i, columns["block", place.block]] = design[i, columns["kind", place.kind]] = 1
    gram = design.T @ design + _RIDGE * np.eye(len(columns))
    return np.asarray(design @ np.linalg.solve(gram, design.T))
