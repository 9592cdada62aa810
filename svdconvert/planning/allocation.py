"""Spending one budget of parameters over all matrices, singular value by singular value.

Keeping rank r of matrix i costs f_i(r) parameters and loses the sum of s_ij^2 over j > r; staying dense costs m n
and loses nothing. With a price p per parameter every matrix chooses for itself the rank of least loss + p f_i(r),
and the price is set so that the budget is met (Lagrange; Everett, 1963). The rest of the budget then buys single ranks,
the best gain per parameter first, until nothing fits.

This holds for any cost that grows with the rank: r (m + n) for two factors, and r (m + n - r) for pivoted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdconvert.errors import InputError
from svdconvert.planning.ranks import Target


@dataclass(frozen=True)
class _Choices:
    """The choices of a matrix: option i costs cost[i] and loses loss[i]; the last one, rank None, is staying dense."""

    ranks: Sequence[int | None]
    cost: NDArray[np.float64]
    loss: NDArray[np.float64]

    def best(self, price: float) -> int:
        """The option of least loss + price * cost."""
        return int(np.argmin(self.loss + price * self.cost))


def allocate(
    targets: Sequence[Target],
    spectra: Sequence[NDArray[np.float64]],
    budget: int,
    *,
    cost: Callable[[int, tuple[int, int]], int],
    floor: float = 0.1,
    multiple: int = 1,
) -> list[int | None]:
    """Ranks that leave the least total loss within a budget.

    Args:
        targets: the matrices.
        spectra: their squared singular values in one currency, descending, each of length min(m, n).
        budget: parameters for all of them together.
        cost: (rank, shape) -> parameters stored.
        floor: least rank of a matrix, as a fraction of what a uniform share of the budget would give it; keeps a
            layer from being starved where the estimate, good only near the dense model, says that it is worth nothing.
        multiple: every rank is a multiple of it.

    Returns:
        For each matrix its rank, or None where it stays dense.

    Raises:
        InputError: the budget is below the floor.
    """
    dense = sum(target.dense_params for target in targets)
    choices = [
        _choices(target, spectrum, cost, floor * budget / dense, multiple)
        for target, spectrum in zip(targets, spectra, strict=True)
    ]
    least = sum(int(choice.cost[0]) for choice in choices)
    if budget < least:
        raise InputError(
            f"a budget of {budget:,} parameters is too small, since the lowest ranks take {least:,}; keep more"
        )
    picked = _priced(choices, budget)
    _spend_rest(choices, picked, budget)
    return [choice.ranks[option] for choice, option in zip(choices, picked, strict=True)]


def _choices(
    target: Target,
    spectrum: NDArray[np.float64],
    cost: Callable[[int, tuple[int, int]], int],
    share: float,
    multiple: int,
) -> _Choices:
    m, n = target.shape
    uniform = next((r for r in range(min(m, n), 0, -1) if cost(r, target.shape) <= share * target.dense_params), 1)
    # The floor's own rank rounded down, so that a coarse multiple does not raise it.
    lowest = max(uniform - uniform % multiple, multiple)
    saving = [r for r in range(lowest, min(m, n) + 1, multiple) if cost(r, target.shape) < target.dense_params]
    tails = np.concatenate([np.cumsum(spectrum[::-1])[::-1], [0.0]])  # tails[r]: the loss at rank r
    costs = [cost(r, target.shape) for r in saving] + [target.dense_params]
    losses = [tails[r] for r in saving] + [0.0]
    return _Choices([*saving, None], np.array(costs, dtype=np.float64), np.array(losses))


def _priced(choices: Sequence[_Choices], budget: int) -> list[int]:
    """Each matrix's best option at the lowest price at which all options fit the budget."""

    def at(price: float) -> list[int]:
        return [choice.best(price) for choice in choices]

    def total(picked: Sequence[int]) -> float:
        return float(sum(choice.cost[option] for choice, option in zip(choices, picked, strict=True)))

    free = at(0.0)
    if total(free) <= budget:
        return free
    low, high = 0.0, 1e-30
    while total(at(high)) > budget:
        low, high = high, high * 16
        if high > 1e60:
            return [0] * len(choices)
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if total(at(middle)) > budget else (low, middle)
    return at(high)


def _spend_rest(choices: Sequence[_Choices], picked: list[int], budget: int) -> None:
    """Buy single ranks with the rest of the budget, the best gain per parameter first."""
    rest = budget - int(sum(choice.cost[option] for choice, option in zip(choices, picked, strict=True)))
    while True:
        best, gain = -1, 0.0
        for i, (choice, option) in enumerate(zip(choices, picked, strict=True)):
            if option + 1 == len(choice.cost):
                continue
            price = choice.cost[option + 1] - choice.cost[option]
            if price <= rest:
                worth = (choice.loss[option] - choice.loss[option + 1]) / max(price, 1.0)
                if worth > gain or best < 0:
                    best, gain = i, worth
        if best < 0:
            return
        rest -= int(choices[best].cost[picked[best] + 1] - choices[best].cost[picked[best]])
        picked[best] += 1
