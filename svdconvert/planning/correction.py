"""Prices of a global budget, corrected by what single directions are worth at the compressed model.

A global budget (``planning/allocation.py``) buys directions by their squared singular values, as if each unit of them
were worth the same in every matrix. What is measured around the edge of each matrix says what a unit is really worth
there, but noisily. So its logarithm is pulled towards the sum of what the matrices of its block and those of its kind
have in common, as far as two halves of the text disagree, and the old prices move a part of the way: the measurement
holds for small changes, and every change of the ranks changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Corrections of a budget, each from the best ranks so far.
ROUNDS = 4
# Directions on each side of the edge, as a share of the rank, and how many at least.
WINDOW, LEAST = 0.15, 4
# A matrix's own measurement counts between these multiples of the median.
LOWEST, HIGHEST = 0.2, 5.0
# How far the logarithms of the prices move; half as far after a correction that has not helped.
DAMPING = 0.5
# What pulls the effects of blocks and kinds towards zero, beside one for each matrix that has them.
_RIDGE = 1e-2


@dataclass(frozen=True)
class Edge:
    """What the directions around the edge of a truncation are worth together.

    Attributes:
        measured: what KL falls by to first order, in nats per token, by the first and the second half of the text.
        predicted: the sum of their squared singular values.
    """

    measured: tuple[float, float]
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


def corrected(
    prices: Mapping[str, float], edges: Mapping[str, Edge], places: Mapping[str, Place], damping: float = DAMPING
) -> dict[str, float]:
    """New prices.

    Args:
        prices: module path -> its price so far, what its squared singular values were multiplied with; above 0.
        edges: what was measured at the ranks of these prices.
        places: where the modules are.
        damping: how far the logarithms of the prices move, 0 to 1.

    Returns:
        Prices whose geometric mean is 1.
    """
    modules = list(edges)
    halves = [_logarithms([edges[module].measured[half] for module in modules], modules, edges) for half in (0, 1)]
    whole = _logarithms([sum(edges[module].measured) for module in modules], modules, edges)
    common = _effects([places[module] for module in modules])
    residuals = [half - common @ half for half in halves]
    fitted = common @ whole
    wanted = fitted + _agreement(*residuals) * (whole - fitted)
    old = np.log([prices.get(module, 1.0) for module in modules])
    new = old + damping * (wanted - old)
    return dict(zip(modules, np.exp(new - new.mean()).tolist(), strict=True))


def _logarithms(measured: Sequence[float], modules: Sequence[str], edges: Mapping[str, Edge]) -> NDArray[np.float64]:
    """What a unit is worth in each matrix, as a logarithm, beside the median; bounded."""
    predicted = np.array([edges[module].predicted for module in modules])
    seen = predicted > 0
    ratios = np.where(seen, np.array(measured) / np.where(seen, predicted, 1.0), np.nan)
    median = float(np.nanmedian(ratios)) if seen.any() else 0.0
    if not median > 0:  # more directions do harm than good: nothing to go by
        return np.zeros(len(modules))
    return np.log(np.clip(np.where(seen, ratios / median, 1.0), LOWEST, HIGHEST))


def _effects(places: Sequence[Place]) -> NDArray[np.float64]:
    """[n, n]: logarithms -> the sums of the effects of block and kind that fit them best (ridge regression)."""
    levels = [sorted({(name, getattr(place, name)) for place in places}) for name in ("block", "kind")]
    columns = {level: i for i, level in enumerate([*levels[0], *levels[1]])}
    design = np.zeros((len(places), len(columns)))
    for i, place in enumerate(places):
        design[i, columns["block", place.block]] = design[i, columns["kind", place.kind]] = 1
    gram = design.T @ design + _RIDGE * np.eye(len(columns))
    return np.asarray(design @ np.linalg.solve(gram, design.T))


def _agreement(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """How much of the variance of the mean of two measurements is no noise, by what they have in common; 0 to 1."""
    both = float(np.mean(((one + other) / 2) ** 2))
    return min(max(float(np.mean(one * other)) / both, 0.0), 1.0) if both > 0 else 0.0
