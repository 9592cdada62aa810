"""The choice of ranks and bits within a budget of bytes, against trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from svdconvert.errors import InputError
from svdconvert.grids import Grid
from svdconvert.planning.choices import Choice, choose

WIDTHS = 4


def _lists(seed: int, matrices: int = 4) -> list[list[Choice]]:
    """Lists as they are found: dense at every width with falling losses, and products of low rank."""
    chance = random.Random(seed)
    lists = []
    for _ in range(matrices):
        size, weight = chance.randint(1, 8) * 64, chance.uniform(0.01, 3)
        dense = [
            Choice(None, () if bits == 16 else (Grid(bits, 32),), size * bits, 0.0 if bits == 16 else weight * 4**-bits)
            for bits in (16, 8, 4, 3)
        ]
        assert len(dense) == WIDTHS
        products = [
            Choice(rank, (Grid(bits), Grid(bits)), rank * size * bits // 8, weight * chance.random() / rank**2)
            for rank in (1, 2, 5)
            for bits in (8, 4)
        ]
        lists.append([*dense, *products])
    return lists


def _all(lists: list[list[Choice]], budget: int) -> float:
    """The least loss within a budget, by trying everything."""
    fitting = (
        sum(choice.loss for choice in picked)
        for picked in itertools.product(*lists)
        if sum(choice.nbytes for choice in picked) <= budget
    )
    return min(fitting)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_within_one_step_of_the_best_one_and_never_worse_than_even_rounding(seed):
    lists = _lists(seed)
    smallest = sum(min(choice.nbytes for choice in choices) for choices in lists)
    largest = sum(max(choice.nbytes for choice in choices) for choices in lists)
    for share in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        budget = int(smallest + share * (largest - smallest))
        picked = choose(lists, budget)
        assert all(choice in choices for choice, choices in zip(picked, lists, strict=True))
        assert sum(choice.nbytes for choice in picked) <= budget
        loss, best = sum(choice.loss for choice in picked), _all(lists, budget)
        assert loss >= best - 1e-15
        # Walking down hulls misses at most the one step that did not fit (Sinha and Zoltners).
        assert loss - best <= max(max(choice.loss for choice in choices) for choices in lists)
        for place in range(WIDTHS):  # the dense choices come first
            even = [choices[place] for choices in lists]
            fits = sum(choice.nbytes for choice in even) <= budget
            assert not fits or loss <= sum(choice.loss for choice in even)


def test_on_average_it_is_close_to_the_best():
    ratios = []
    for seed in range(20):
        lists = _lists(seed, 5)
        budget = sum(sorted(choice.nbytes for choice in choices)[4] for choices in lists)
        best = _all(lists, budget)
        if best > 0:
            ratios.append(sum(choice.loss for choice in choose(lists, budget)) / best)
    assert sum(ratios) / len(ratios) < 1.1


def test_a_larger_budget_that_buys_everything_loses_nothing():
    lists = _lists(3)
    assert sum(choice.loss for choice in choose(lists, 10**9)) == 0


def test_a_budget_below_the_smallest_choices_is_refused():
    lists = _lists(5)
    smallest = sum(min(choice.nbytes for choice in choices) for choices in lists)
    assert sum(choice.nbytes for choice in choose(lists, smallest)) == smallest
    with pytest.raises(InputError, match="smallest choices take"):
        choose(lists, smallest - 1)
