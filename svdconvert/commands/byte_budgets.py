"""From decompositions and a budget of bytes to ranks and bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from svdconvert.commands.measured_budgets import bench_of
from svdconvert.commands.work import Work
from svdconvert.grids import Grid
from svdconvert.machine import processes
from svdconvert.planning.bits import as_chosen, types_of
from svdconvert.planning.choices import Choice, byte_price, choose, evenly_rounded
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import target_tensors

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.price_list import PriceLists
    from svdconvert.factoring.worths import Worths


class Stored(NamedTuple):
    """A target as it is to be stored.

    Attributes:
        target: with its rank and grids.
        choice: of its list, with the loss in the metrics.
        worth: what that is to be multiplied with.
    """

    target: Target
    choice: Choice
    worth: float

    @property
    def loss(self) -> float:
        """That it adds, in nats per token."""
        return self.worth * self.choice.loss


@dataclass(frozen=True)
class BytePrices:
    """What every way to store the targets costs.

    Attributes:
        lists: make the price lists.
        targets: stored in any way.
        codes: of each, the type of weights and scales.
        dense: of each, its dense choices.
        measured: measures worths.
        worths: of each, what losses of dense choices in the metrics are to be multiplied with.
        workers: matrices in work at the same time.
    """

    lists: PriceLists
    targets: Sequence[Target]
    codes: Sequence[str]
    dense: Sequence[Sequence[Choice]]
    measured: Worths
    worths: Sequence[float]
    workers: int | None

    @classmethod
    def of(cls, work: Work, plan: Plan, store: Decompositions) -> BytePrices:
        """Price all dense choices, and make them comparable.

        Args:
            work: the conversion.
            plan: of the same targets, stored in any way.
            store: their decompositions, with both metrics whole.

        Raises:
            InputError: a matrix does not fit its type.
            JobError: a price list cannot be written.
        """
        import torch

        from svdconvert.factoring.decompositions import decompositions_key
        from svdconvert.factoring.price_list import PriceLists
        from svdconvert.factoring.worths import Worths, dense_way

        source, request = work.source, work.request
        tensors = target_tensors(source, plan.targets)
        lists = PriceLists(
            source=source,
            tensors=tensors,
            store=store,
            key=decompositions_key(source, request.method, request.options, work.knowledge, work.device),
            folder=work.place / "prices",
            widths=request.size.chosen_widths,
            multiple=request.size.multiple,
            device=torch.device(work.device),
            events=work.events,
        )
        codes, workers = types_of(plan.targets, tensors, request), request.runtime.workers
        dense = lists.dense(plan.targets, codes, workers)
        measured = Worths(bench_of(work), store, tensors, plan.targets, codes)
        worths = _measured(measured, [dense_way(choices) for choices in dense], [1.0] * len(dense))
        return cls(lists, plan.targets, codes, dense, measured, worths, workers)

    def offers(self, budget: int) -> Offers:
        """What a budget may be spent on, products included.

        Args:
            budget: bytes for all targets.

        Raises:
            InputError: a matrix does not fit its type.
            JobError: a price list cannot be written.
        """
        from svdconvert.factoring.worths import is_measurable, product_way

        found = self.dense

        def prices() -> list[float]:
            price = byte_price(_weighted(found, self.worths, self.worths), budget)
            return [price / worth for worth in self.worths]

        # Products make bytes cheaper, and then others may be worth their bytes.
        while (more := self.lists.at(self.targets, self.codes, found, prices(), self.workers)) is not None:
            found = more
        best = [product_way(choices, price) for choices, price in zip(found, prices(), strict=True)]
        offers = Offers(self.targets, budget, found, self.worths, _measured(self.measured, best, self.worths))
        # What costs more than was thought gives way to products that have to be measured as well.
        taken = [one.choice for one in offers.choose()]
        others = [
            one if one.rank is not None and is_measurable(one) and one != known else None
            for one, known in zip(taken, best, strict=True)
        ]
        products = _measured(self.measured, others, offers.products)
        self.measured.bench.tidy()
        return replace(offers, products=products)


@dataclass(frozen=True)
class Offers:
    """What a budget of bytes may be spent on.

    Attributes:
        targets: stored in any way.
        budget: bytes for all of them.
        lists: of each target, its choices, with their losses in the metrics.
        dense, products: of each target, what those of its dense choices and of its products are to be multiplied with.
    """

    targets: Sequence[Target]
    budget: int
    lists: Sequence[Sequence[Choice]]
    dense: Sequence[float]
    products: Sequence[float]

    def choose(self, counted: float = 1.0) -> list[Stored]:
        """The targets as the choices of the least loss store them.

        Args:
            counted: how often the loss of a product counts in that; infinity for no products.

        Raises:
            InputError: the budget is too small.
        """
        lists, products = self._without_products() if math.isinf(counted) else self.lists, self.products
        return self._stored(choose(_weighted(lists, self.dense, [counted * worth for worth in products]), self.budget))

    def even(self) -> list[Stored] | None:
        """The targets all rounded at one width, the best that fits; None where none does."""
        found = evenly_rounded(_weighted(self._without_products(), self.dense, self.dense), self.budget)
        return None if found is None else self._stored(found)

    def _without_products(self) -> list[list[Choice]]:
        return [[choice for choice in choices if choice.rank is None] for choices in self.lists]

    def _stored(self, chosen: Sequence[Choice]) -> list[Stored]:
        found = []
        for target, one, choices, dense, product in zip(
            self.targets, chosen, self.lists, self.dense, self.products, strict=True
        ):
            known = next(raw for raw in choices if (raw.rank, raw.grids) == (one.rank, one.grids))
            found.append(Stored(as_chosen(target, one), known, dense if one.rank is None else product))
        return found


def _measured(measured: Worths, ways: Sequence[Choice | None], otherwise: Sequence[float]) -> list[float]:
    """Worths of choices; others where there is none."""
    with processes.current().leader_first():  # the others find what the leader has measured
        worths = measured.of(ways)
    return [other if worth is None else worth for worth, other in zip(worths, otherwise, strict=True)]


def _weighted(
    lists: Sequence[Sequence[Choice]], dense: Sequence[float], products: Sequence[float]
) -> list[list[Choice]]:
    """The lists with losses that may be compared, by the worths of dense choices and of products."""
    return [
        [replace(choice, loss=(own if choice.rank is None else other) * choice.loss) for choice in choices]
        for choices, own, other in zip(lists, dense, products, strict=True)
    ]


def as_recorded(targets: Sequence[Target], record: Mapping[str, Any]) -> list[Target]:
    """The targets as an earlier run has chosen to store them.

    Args:
        targets: stored in any way.
        record: of the result.
    """
    found = []
    for target in targets:
        told = {**record["matrices"], **record.get("rounded", {})}.get(target.module, {})
        pairs = zip(told.get("bits", ()), told.get("groups", ()), strict=True)
        grids = tuple(Grid(bits, group) if bits <= 8 else None for bits, group in pairs)
        found.append(as_chosen(target, Choice(told.get("rank"), grids, 0, 0.0)))
    return found
