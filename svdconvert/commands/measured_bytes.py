"""Spending a budget of bytes: as the prices say, or, of a few ways, the one that was measured to be the best.

Prices add up what single matrices lose, each measured alone at the dense model. What products lose together, and far
from it, they tell too low, on some models by half and on others several times. So a request for measuring has the
same budget spent in a few ways, each compressed model measured on held-out sequences of the calibration text, and the
one nearest to the dense model taken. Even rounding is among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from svdconvert.commands.byte_budgets import BytePrices, Offers, Stored
from svdconvert.commands.measured_budgets import MeasuredBudget, bench_of
from svdconvert.commands.work import Work
from svdconvert.machine import processes
from svdconvert.planning.make import bytes_budget, plan_for
from svdconvert.planning.plan import Plan
from svdconvert.sentences import Sentence

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions

# How often the loss of a product counts, beside once and never.
COUNTED = 2.5


def spend_bytes(work: Work, plan: Plan, store: Decompositions) -> tuple[list[Stored], MeasuredBudget | None]:
    """The targets with the ranks and grids that leave the least loss, and what was measured to choose them, if asked.

    Args:
        work: the conversion.
        plan: of the same targets, stored in any way.
        store: their decompositions, with both metrics whole.

    Raises:
        InputError: the budget is too small, or a matrix does not fit its type.
        JobError: a price list or a measurement cannot be written.
    """
    offers = BytePrices.of(work, plan, store).offers(bytes_budget(work.source, work.request, plan.targets))
    return _best(work, offers, store) if work.measures else (offers.choose(), None)


def ways_to_spend(offers: Offers) -> dict[str, list[Stored]]:
    """Name -> the targets as they would be stored; without repetitions.

    Args:
        offers: what the budget may be spent on.
    """
    found = {
        "products as priced": offers.choose(),
        f"products counted {COUNTED:g} times": offers.choose(COUNTED),
        "no products": offers.choose(math.inf),
    }
    even = offers.even()
    if even is not None:
        bits = min(grid.bits for one in even for grid in one.target.grids if grid is not None)
        found[f"all in {bits} bits"] = even
    different: dict[str, list[Stored]] = {}
    for name, stored in found.items():
        if stored not in different.values():
            different[name] = stored
    return different


def _best(work: Work, offers: Offers, store: Decompositions) -> tuple[list[Stored], MeasuredBudget]:
    """The way that is the nearest to the dense model on held-out sequences."""
    from svdconvert.factoring.trials import Trial, Trials

    bench, found = bench_of(work), ways_to_spend(offers)
    trials = Trials(bench)

    def measured(name: str, stored: Sequence[Stored]) -> Trial:
        targets = [one.target for one in stored]
        made = plan_for(work.source, work.request, targets, store.files(targets))
        return trials.measure(made.targets, made.steps, name)

    with processes.current().leader_first():  # the others find what the leader has measured
        results = {name: measured(name, stored) for name, stored in found.items()}
    bench.tidy()
    best = min(results, key=lambda name: results[name].kl)
    trial = results[best]
    budget = MeasuredBudget(
        trial.kl,
        trial.added,
        trial.dense,
        trial.tokens,
        tried=tuple({"name": name, "kl": one.kl, "added": one.added} for name, one in results.items()),
    )
    work.events.note(Sentence(f"{best}: {budget}"))
    return found[best], budget
