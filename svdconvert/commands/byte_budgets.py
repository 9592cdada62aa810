"""From decompositions and a budget of bytes to ranks and bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from svdconvert.commands.measured_budgets import bench_of
from svdconvert.commands.work import Work
from svdconvert.grids import Grid
from svdconvert.machine import processes
from svdconvert.planning.bits import as_chosen, types_of
from svdconvert.planning.choices import Choice, byte_price, choose
from svdconvert.planning.make import bytes_budget
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import target_tensors

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.price_list import PriceLists

# The loss of a product in few bits counts so many times. Worths are measured on rounded matrices, whose errors are
# noise; a truncation takes whole directions from every token, which costs 1.3 to 8 times as much, where both were
# measured token by token on SmolLM2-135M. Gemma 3 270M loses 3 times as much without it (docs/rank-or-bits.md).
PRODUCT = 2.5


@dataclass(frozen=True)
class BytePrices:
    """What every way to store the targets costs.

    Attributes:
        lists: make the price lists.
        targets: stored in any way.
        codes: of each, the type of weights and scales.
        dense: of each, its dense choices.
        worths: of each, what losses in the metrics are to be multiplied with (``factoring/worths.py``).
        workers: matrices in work at the same time.
    """

    lists: PriceLists
    targets: Sequence[Target]
    codes: Sequence[str]
    dense: Sequence[Sequence[Choice]]
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
        from svdconvert.factoring.worths import measured_worths

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
        bench = bench_of(work)
        with processes.current().leader_first():  # the others find what the leader has measured
            worths = measured_worths(bench, store, tensors, plan.targets, codes, dense)
        bench.tidy()
        return cls(lists, plan.targets, codes, dense, worths, workers)

    def worths_of(self, targets: Sequence[Target]) -> dict[str, float]:
        """Module path -> what the loss in the metrics is to be multiplied with.

        Args:
            targets: the same, as they are to be stored.
        """
        pairs = zip(targets, self.worths, strict=True)
        return {target.module: worth * _factor(target.rank) for target, worth in pairs}

    def choose(self, budget: int) -> list[tuple[Target, float]]:
        """The targets as the choices of the least loss store them, and what each of them loses.

        Args:
            budget: bytes for all of them.

        Raises:
            InputError: the budget is too small, or a matrix does not fit its type.
            JobError: a price list cannot be written.
        """
        found = self.dense

        def prices() -> list[float]:
            price = byte_price(_weighted(found, self.worths), budget)
            return [price / worth for worth in self.worths]

        # Products make bytes cheaper, and then others may be worth their bytes.
        while (more := self.lists.at(self.targets, self.codes, found, prices(), self.workers)) is not None:
            found = more
        chosen = choose(_weighted(found, self.worths), budget)
        return [(as_chosen(target, choice), choice.loss) for target, choice in zip(self.targets, chosen, strict=True)]


def spend_bytes(work: Work, plan: Plan, store: Decompositions) -> tuple[list[Target], dict[str, float]]:
    """The targets with the ranks and grids that leave the least loss; and module path -> worth of its losses.

    Args, Raises: see :meth:`BytePrices.of`.
    """
    budget = bytes_budget(work.source, work.request, plan.targets)
    prices = BytePrices.of(work, plan, store)
    targets = [target for target, _ in prices.choose(budget)]
    return targets, prices.worths_of(targets)


def _weighted(lists: Sequence[Sequence[Choice]], worths: Sequence[float]) -> list[list[Choice]]:
    """The lists with losses that may be compared."""
    return [
        [replace(choice, loss=worth * _factor(choice.rank) * choice.loss) for choice in choices]
        for choices, worth in zip(lists, worths, strict=True)
    ]


def _factor(rank: int | None) -> float:
    return 1.0 if rank is None else PRODUCT


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
