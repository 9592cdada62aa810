"""From decompositions to ranks: a budget is spent evenly, or where it helps most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from svdconvert.planning.allocation import allocate
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target, assign
from svdconvert.settings.size import Size

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions


def spread(plan: Plan, size: Size) -> list[Target]:
    """Uniform ranks of a size.

    Args:
        plan: of any ranks.
        size: not one that has to be found.

    Raises:
        InputError: there are no ranks so low.
    """
    dense = sum(target.dense_params for target in plan.targets)
    return assign(_without_ranks(plan), size, plan.params_before - dense)


def spend(plan: Plan, size: Size, store: Decompositions, prices: Mapping[str, float] | None = None) -> list[Target]:
    """Ranks of a global budget: as many parameters as uniform ranks would take, spent where they help most.

    Args:
        plan: of uniform ranks.
        size: the budget; not one that has to be found.
        store: the decompositions of all its targets.
        prices: module path -> what its squared singular values are multiplied with; None for 1 everywhere.

    Raises:
        InputError: the budget is below what the least ranks cost.
    """
    targets = _without_ranks(plan)
    dense = sum(target.dense_params for target in targets)
    budget = size.budget(dense, plan.params_before - dense)
    if budget is None:
        budget = sum(target.params for target in plan.targets)
    spectra = [store.spectrum(target).numpy() for target in targets]
    if prices is not None:
        spectra = [spectrum * prices.get(target.module, 1.0) for spectrum, target in zip(spectra, targets, strict=True)]
    ranks = allocate(targets, spectra, budget, cost=targets[0].layout.cost, multiple=size.multiple)
    return with_ranks(targets, ranks)


def with_ranks(targets: Sequence[Target], ranks: Sequence[int | None]) -> list[Target]:
    """Targets with the ranks of a global budget; None keeps one dense."""
    return [
        replace(target, rank=rank, reason="" if rank is not None else "kept whole by the budget")
        for target, rank in zip(targets, ranks, strict=True)
    ]


def _without_ranks(plan: Plan) -> list[Target]:
    return [replace(target, rank=None, reason="", grids=()) for target in plan.targets]
