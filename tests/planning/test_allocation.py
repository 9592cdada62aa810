"""Budgets against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdconvert.errors import InputError
from svdconvert.planning.allocation import _Choices, _spend_rest, allocate
from svdconvert.planning.ranks import Target


def balanced(rank: int, shape: tuple[int, int]) -> int:
    return rank * sum(shape)


def pivoted(rank: int, shape: tuple[int, int]) -> int:
    return rank * (sum(shape) - rank)


def target(*shape: int) -> Target:
    return Target("x", "x.weight", (shape[0], shape[1]))


def outcome(targets, spectra, ranks, cost):
    spent = sum(t.dense_params if r is None else cost(r, t.shape) for t, r in zip(targets, ranks, strict=True))
    left = sum(0 if r is None else s[r:].sum() for s, r in zip(spectra, ranks, strict=True))
    return spent, left


@st.composite
def problems(draw):
    shapes = draw(st.lists(st.tuples(st.integers(2, 7), st.integers(2, 7)), min_size=1, max_size=3))
    seed = draw(st.integers(0, 10_000))
    random = np.random.default_rng(seed)
    spectra = [np.sort(random.pareto(1.0, min(shape)))[::-1] * 10 ** random.uniform(-2, 2) for shape in shapes]
    return [target(*shape) for shape in shapes], spectra, draw(st.floats(0.2, 1.1))


@settings(max_examples=80)
@given(problem=problems(), cost=st.sampled_from([balanced, pivoted]), multiple=st.sampled_from([1, 1, 2, 3]))
def test_near_the_best_of_all(problem, cost, multiple) -> None:
    """Never over the budget, nothing more fits, and within one matrix's step of what brute force finds."""
    targets, spectra, share = problem
    budget = int(share * sum(t.dense_params for t in targets))
    options = [
        [r for r in range(multiple, min(t.shape) + 1, multiple) if cost(r, t.shape) < t.dense_params] + [None]
        for t in targets
    ]
    feasible = [
        outcome(targets, spectra, ranks, cost)
        for ranks in itertools.product(*options)
        if outcome(targets, spectra, ranks, cost)[0] <= budget
    ]
    if not feasible:
        with pytest.raises(InputError, match="too small"):
            allocate(targets, spectra, budget, cost=cost, floor=0, multiple=multiple)
        return
    ranks = allocate(targets, spectra, budget, cost=cost, floor=0, multiple=multiple)
    spent, left = outcome(targets, spectra, ranks, cost)
    assert spent <= budget
    for i, rank in enumerate(ranks):
        if rank is not None:
            following = options[i][options[i].index(rank) + 1]
            assert outcome(targets, spectra, [*ranks[:i], following, *ranks[i + 1 :]], cost)[0] > budget
    best = min(loss for _, loss in feasible)
    # A price finds the best outcome for what it spends; the budget's rounding is worth at most one matrix's option.
    cheaper = min((loss for paid, loss in feasible if paid <= spent), default=best)
    assert left <= cheaper + max(s.sum() for s in spectra) * (1 if len(targets) > 1 else 1e-12)


def test_greedy_optimum_for_linear_costs() -> None:
    """Equal shapes: the largest squared singular values of all matrices win."""
    random = np.random.default_rng(0)
    targets = [target(40, 40) for _ in range(6)]
    spectra = [np.sort(random.exponential(1.0, 40))[::-1] * 4.0**i for i in range(6)]
    budget = 6 * 8 * 80
    ranks = allocate(targets, spectra, budget, cost=balanced, floor=0)
    assert all(rank is not None for rank in ranks[:4])
    spent, left = outcome(targets, spectra, ranks, balanced)
    assert budget - spent < 80
    uniform = sum(s[8:].sum() for s in spectra)
    assert left < uniform
    kept = [r if r is not None else 40 for r in ranks]
    assert kept == sorted(kept)  # more where the values are larger


def test_floor_keeps_every_layer_alive() -> None:
    targets = [target(64, 64), target(64, 64)]
    spectra = [np.full(64, 1e6), np.full(64, 1e-6)]
    budget = 64 * 64
    starved = allocate(targets, spectra, budget, cost=balanced, floor=0)
    fed = allocate(targets, spectra, budget, cost=balanced, floor=0.5)
    assert starved[1] == 1 or (starved[1] is not None and starved[1] <= 2)
    assert fed[1] is not None
    assert fed[1] >= 8


def test_enough_for_everything_stays_dense() -> None:
    targets = [target(16, 16), target(8, 32)]
    spectra = [np.ones(16), np.ones(8)]
    assert allocate(targets, spectra, 512, cost=balanced) == [None, None]


def test_pivoted_buys_more_rank() -> None:
    targets, spectra = [target(64, 64)], [np.ones(64)]
    two, one = (allocate(targets, spectra, 2400, cost=cost)[0] for cost in (pivoted, balanced))
    assert one == 18
    assert two == 22


def test_multiples() -> None:
    """The budget is spent in steps of the multiple, and the floor is rounded down to one."""
    random = np.random.default_rng(1)
    targets = [target(64, 64) for _ in range(4)]
    spectra = [np.sort(random.exponential(1.0, 64))[::-1] * 4.0**i for i in range(4)]
    budget = 4 * 15 * 128
    ranks = allocate(targets, spectra, budget, cost=balanced, multiple=8, floor=0.8)
    assert all(rank is None or (rank % 8 == 0 and rank >= 8) for rank in ranks)
    spent, _ = outcome(targets, spectra, ranks, balanced)
    assert 0 <= budget - spent < 8 * 128
    assert 8 in ranks  # uniform would be 15, the floor 12


def test_a_budget_below_the_least_ranks() -> None:
    with pytest.raises(InputError, match=r"a budget of 100 parameters is too small, .* take 128; keep more"):
        allocate([target(64, 64)], [np.ones(64)], 100, cost=balanced)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_whole_matrix_loses_nothing_in_any_unit(unit: float) -> None:
    """The first matrix matters and stays whole for 256 parameters; the second gets the other 64, two ranks."""
    spectra = [np.full(16, unit), np.full(16, 1e-3 * unit)]
    assert allocate([target(16, 16), target(16, 16)], spectra, 320, cost=balanced) == [None, 2]


def test_the_rest_of_a_budget_goes_where_it_gains_most() -> None:
    """Not where most is lost: the first matrix would lose 99 with another rank, the second nothing."""
    losses = ([100.0, 99.0], [10.0, 0.0])
    choices = [_Choices([1, 2], np.array([10.0, 20.0]), np.array(loss)) for loss in losses]
    picked = [0, 0]
    _spend_rest(choices, picked, 30)
    assert picked == [0, 1]
