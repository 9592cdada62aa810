"""From decompositions to ranks: a budget is spent, or the smallest one is found that loses little enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from svdconvert.commands.work import Work
from svdconvert.errors import InputError
from svdconvert.machine import processes
from svdconvert.planning.allocation import allocate
from svdconvert.planning.make import plan_for
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target, assign
from svdconvert.planning.size_search import STEPS, smallest
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.size import Size

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.trials import Trial, Trials

# What a limit is called -> the field of a trial that it limits.
_LIMITED = {"max_loss": "added", "max_kl": "kl"}


@dataclass(frozen=True)
class MeasuredBudget:
    """What was measured to choose ranks, on held-out sequences of the calibration text, in nats per token.

    Attributes:
        kl: mean KL(dense || compressed) of the chosen ranks.
        added: loss that they add.
        dense_loss: the dense model's.
        tokens: number of predicted tokens.
        share: fraction of the target parameters kept, where that was to be found; None otherwise.
        sizes: what was measured to find it: ``share``, ``kl`` and ``added`` of each, in that order.
    """

    kl: float
    added: float
    dense_loss: float
    tokens: int
    share: float | None = None
    sizes: Sequence[Mapping[str, float]] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON types, without those that do not apply."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}

    def __str__(self) -> str:
        """A sentence for the user."""
        size = "" if self.share is None else f"{self.share:.1%} of the target parameters kept: "
        return (
            f"{size}KL {self.kl:.4f} and {self.added:+.4f} nats per token on {self.tokens:,} held-out tokens of the "
            f"calibration text (dense {self.dense_loss:.4f})"
        )


@dataclass
class _Chooser:
    """Ranks for budgets of one model, and what they cost."""

    work: Work
    plan: Plan
    store: Decompositions
    trials: Trials | None = None
    sizes: list[dict[str, float]] = field(default_factory=list)

    def ranks(self, size: Size) -> list[Target]:
        """The targets with the ranks of a size.

        Raises:
            InputError: there are none so low.
        """
        if self.work.request.allocation == "uniform":
            dense = sum(target.dense_params for target in self.plan.targets)
            return assign(_without_ranks(self.plan), size, self.plan.params_before - dense)
        return spend(self.plan, size, self.store)

    def trial(self, targets: Sequence[Target], name: str) -> Trial:
        """What ranks cost on held-out sequences."""
        assert self.trials is not None
        plan = plan_for(self.work.source, self.work.request, targets, self.store.files(targets))
        return self.trials.measure(plan.targets, plan.steps, name)

    def smallest(self, limit: tuple[str, float]) -> tuple[list[Target], MeasuredBudget]:
        """The smallest size within a limit.

        Raises:
            InputError: there is none.
        """
        name, nats = limit
        found: dict[int, tuple[list[Target], Trial]] = {}

        def lost(step: int) -> float:
            share = step / STEPS
            try:
                targets = self.ranks(self.work.request.size.at(share))
            except InputError:  # below the lowest ranks
                return math.inf
            trial = self.trial(targets, f"{share:.1%} kept")
            self.sizes.append({"share": share, "kl": trial.kl, "added": trial.added})
            found[step] = targets, trial
            return float(getattr(trial, _LIMITED[name]))

        bounds = smallest(lost, nats)
        if bounds.high == STEPS:
            most = self.sizes[-1]
            raise InputError(
                f"{asked(name, nats)} cannot be met: {most['share']:.1%} of the target parameters kept, the most that "
                f"is tried, cost {most[_LIMITED[name]]:.4f} nats per token on held-out text; allow more, or factor "
                f"fewer layers ({asked('targets')})"
            )
        targets, trial = found[bounds.high]
        return targets, MeasuredBudget(
            trial.kl, trial.added, trial.dense, trial.tokens, share=bounds.high / STEPS, sizes=tuple(self.sizes)
        )


def check_sequences(work: Work) -> None:
    """Refuse a text that is too short to measure on, before it is worked on.

    Raises:
        InputError: it has too few sequences.
    """
    if work.measures:
        from svdconvert.factoring.samples import held_out_sample

        assert work.knowledge is not None, "a rule of the request"
        held_out_sample(work.knowledge.text)


def choose_ranks(work: Work, plan: Plan, store: Decompositions) -> tuple[Sequence[Target], MeasuredBudget | None]:
    """The ranks of a request that leaves them open, and what was measured for that.

    Args:
        work: the conversion.
        plan: the plan made from headers alone.
        store: the decompositions of all its targets.

    Raises:
        InputError: the budget is below what the least ranks cost, or no size is good enough.
    """
    chooser = _Chooser(work, plan, store)
    if not work.measures:
        return chooser.ranks(work.request.size), None
    chooser.trials = _trials(work)
    limit = work.request.size.limit
    assert limit is not None
    with processes.current().leader_first():  # the others find what the leader has measured
        targets, budget = chooser.smallest(limit)
    chooser.trials.tidy()
    work.events.note(Sentence(str(budget)))
    return targets, budget


def _trials(work: Work) -> Trials:
    from svdconvert.factoring.decompositions import decompositions_key
    from svdconvert.factoring.trials import Trials

    assert work.knowledge is not None, "a rule of the request"
    request = work.request
    key = decompositions_key(work.source, request.method, request.options, work.knowledge, work.device)
    return Trials(
        work.source,
        work.knowledge.text,
        key,
        folder=(work.kept or work.job / "work") / "trials",
        states=work.job / "trials",
        device=work.device,
        batch_size=work.knowledge.batch_size,
        events=work.events,
    )


def spend(plan: Plan, size: Size, store: Decompositions, prices: Mapping[str, float] | None = None) -> list[Target]:
    """Ranks of a global budget: as many parameters as uniform ranks would take, spent where they help most.

    Args:
        plan: of uniform ranks.
        size: the budget.
        store: the decompositions of all its targets.
        prices: module path -> what its squared singular values are multiplied with; none means 1.

    Raises:
        InputError: the budget is below what the least ranks cost.
    """
    targets = _without_ranks(plan)
    dense = sum(target.dense_params for target in targets)
    budget = size.budget(dense, plan.params_before - dense)
    if budget is None:
        budget = sum(target.params for target in plan.targets)
    ranks = allocate(
        targets,
        [store.spectrum(target).numpy() * (prices or {}).get(target.module, 1.0) for target in targets],
        budget,
        cost=targets[0].layout.cost,
        multiple=size.multiple,
    )
    return with_ranks(targets, ranks)


def _without_ranks(plan: Plan) -> list[Target]:
    return [replace(target, rank=None, reason="") for target in plan.targets]


def with_ranks(targets: Sequence[Target], ranks: Sequence[int | None]) -> list[Target]:
    """Targets with the ranks of a global budget; None keeps one dense."""
    return [
        replace(target, rank=rank, reason="" if rank is not None else "the budget keeps it whole")
        for target, rank in zip(targets, ranks, strict=True)
    ]
