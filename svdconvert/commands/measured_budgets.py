"""Ranks that are chosen by measuring compressed models: the smallest size within a limit, and corrected prices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from svdconvert.commands.budgets import spend, spread
from svdconvert.commands.work import Work
from svdconvert.errors import InputError
from svdconvert.machine import processes
from svdconvert.names import layer_number, suffix
from svdconvert.planning.correction import ROUNDS, Edge, Place, corrected
from svdconvert.planning.make import plan_for
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target
from svdconvert.planning.size_search import STEPS, Bounds, smallest
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.size import Size

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.edges import Edges
    from svdconvert.factoring.sampled import Bench
    from svdconvert.factoring.trials import Trial, Trials

# What a limit is called -> the field of a trial that it limits.
_LIMITED = {"max_loss": "added", "max_kl": "kl"}
# Steps by which a size is expected to shrink where corrected prices help.
_GAIN = 4

Prices = Mapping[str, float]


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
        rounds: of a measured allocation, ``kl`` and ``added`` of the global budget and of each correction.
        rounded_to: bits that all of it was rounded to afterwards, where it was.
        tried: of a budget of bytes, ``name``, ``kl`` and ``added`` of each way to spend it; the least ``kl`` was taken.
    """

    kl: float
    added: float
    dense_loss: float
    tokens: int
    share: float | None = None
    sizes: Sequence[Mapping[str, float]] = ()
    rounds: Sequence[Mapping[str, float]] = ()
    tried: Sequence[Mapping[str, Any]] = ()
    rounded_to: int | None = None

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> MeasuredBudget:
        """What :meth:`to_json` has given, as svdconvert.json has it; fields that are not known here are left out."""
        return cls(**{name: told[name] for name in cls.__dataclass_fields__ if told.get(name) is not None})

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON types, without those that do not apply."""
        told = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    def __str__(self) -> str:
        """A sentence for the user."""
        size = "" if self.share is None else f"{self.share:.1%} of the target parameters kept: "
        rounds = ", ".join(f"{one['kl']:.4f}" for one in self.rounds)
        corrections = f"; KL of the global budget and its corrections: {rounds}" if rounds else ""
        tried = ", ".join(f"{one['name']} {one['kl']:.4f}" for one in self.tried)
        corrections += f"; KL of what was tried: {tried}" if tried else ""
        corrections += "" if self.rounded_to is None else f"; all before rounding to {self.rounded_to} bits"
        return (
            f"{size}KL {self.kl:.4f}, loss {self.added:+.4f} nats per token on {self.tokens:,} held-out tokens of the "
            f"calibration text (dense {self.dense_loss:.4f}){corrections}"
        )


@dataclass(frozen=True)
class _Choice:
    """Ranks, and what they cost.

    Attributes:
        plan: with these ranks.
        trial: of it.
        share: fraction of the target parameters that they keep, where that was asked for.
        prices: that led to them; None for the decompositions' own.
    """

    plan: Plan
    trial: Trial
    share: float | None
    prices: Prices | None


@dataclass
class _Chooser:
    """Measures the ranks of sizes.

    Attributes:
        work: the conversion.
        plan: made from headers alone.
        store: the decompositions.
        trials: measures ranks.
        edges: measures directions; None unless the allocation is corrected.
        sizes, rounds: what was measured so far, see :class:`MeasuredBudget`.
        refusal: of the last size that no model can have.
    """

    work: Work
    plan: Plan
    store: Decompositions
    trials: Trials
    edges: Edges | None
    sizes: list[dict[str, float]] = field(default_factory=list)
    rounds: list[dict[str, float]] = field(default_factory=list)
    refusal: InputError | None = None

    def choose(self) -> _Choice:
        """The ranks of the request.

        Raises:
            InputError: the budget is below what the least ranks cost, or no size is good enough.
        """
        limit, size = self.work.request.size.limit, self.work.request.size
        if limit is None:
            return self._corrected(size, lambda trial: True)
        name, nats = limit

        def lost(trial: Trial) -> float:
            return float(getattr(trial, _LIMITED[name]))

        bounds, found = self._smallest(nats, lost, None, {})
        if bounds.high == STEPS:
            if bounds.low not in found:  # not even the largest can be made
                assert self.refusal is not None
                raise self.refusal
            most = self.sizes[-1]
            raise InputError(
                f"{asked(name, nats)} cannot be met: {most['share']:.1%} of the target parameters kept, the most that "
                f"is tried, cost {most[_LIMITED[name]]:.4f} nats per token on held-out text; allow more, or factor "
                f"fewer layers ({asked('targets')})"
            )
        if self.edges is None:
            return found[bounds.high]
        best = self._corrected(size.at(bounds.high / STEPS), lambda trial: lost(trial) <= nats)
        if best.prices is None:
            return best
        known = {"first": bounds.high - _GAIN, "bounds": Bounds(0, bounds.high)}
        bounds, found = self._smallest(nats, lost, best.prices, known)
        return found.get(bounds.high, best)

    def _smallest(
        self, nats: float, lost: Callable[[Trial], float], prices: Prices | None, known: Mapping[str, Any]
    ) -> tuple[Bounds, dict[int, _Choice]]:
        """Search among sizes; gives the interval found and what was measured, by steps."""
        found: dict[int, _Choice] = {}

        def measure(step: int) -> float:
            share = step / STEPS
            size = self.work.request.size.at(share)
            try:
                targets = self._ranks(size, prices)
            except InputError as refusal:  # below the lowest ranks, as a rule
                self.refusal = refusal
                return math.inf
            found[step] = self._measured(size, targets, f"{share:.1%} kept", prices)
            trial = found[step].trial
            self.sizes.append({"share": share, "kl": trial.kl, "added": trial.added})
            return lost(trial)

        return smallest(measure, nats, **known), found

    def _corrected(self, size: Size, allowed: Callable[[Trial], bool]) -> _Choice:
        """The best of a global budget and its corrections, by KL on held-out sequences.

        Args:
            size: the budget.
            allowed: whether a trial may be chosen; that of the global budget always may.
        """
        assert self.edges is not None
        places = {
            target.module: Place(layer_number(target.module), suffix(target.module)) for target in self.plan.targets
        }
        best = current = self._measured(size, self._ranks(size, None), "global", None)
        self.rounds = [{"kl": best.trial.kl, "added": best.trial.added}]
        measured: list[Mapping[str, Edge]] = []
        for number in range(ROUNDS):
            measured.append(self.edges.measure(current.plan.targets, current.plan.steps, number))
            prices = corrected(measured, places)
            current = self._measured(size, self._ranks(size, prices), f"correction {number + 1}", prices)
            self.rounds.append({"kl": current.trial.kl, "added": current.trial.added})
            if current.trial.kl < best.trial.kl and allowed(current.trial):
                best = current
        return best

    def _ranks(self, size: Size, prices: Prices | None) -> list[Target]:
        """The targets with the ranks of a size.

        Raises:
            InputError: there are none so low.
        """
        if self.work.request.allocation == "uniform":
            return spread(self.plan, size)
        return spend(self.plan, size, self.store, prices)

    def _measured(self, size: Size, targets: Sequence[Target], name: str, prices: Prices | None) -> _Choice:
        plan = plan_for(self.work.source, self.work.request, targets, self.store.files(targets))
        return _Choice(plan, self.trials.measure(plan.targets, plan.steps, name), size.keep, prices)


def check_sequences(work: Work) -> None:
    """Refuse a text that is too short to measure on, before it is worked on.

    Raises:
        InputError: it has too few sequences.
    """
    if work.measures:
        from svdconvert.factoring.samples import correction_sample, held_out_sample

        assert work.knowledge is not None, "a rule of the request"
        held_out_sample(work.knowledge.text)
        if work.request.allocation == "measured" and not work.request.size.in_bytes:
            correction_sample(work.knowledge.text, 0)


def measured_ranks(work: Work, plan: Plan, store: Decompositions) -> tuple[Sequence[Target], MeasuredBudget]:
    """The ranks of a request that are chosen by measuring, and what was measured.

    Args:
        work: the conversion.
        plan: the plan made from headers alone.
        store: the decompositions of all its targets.

    Raises:
        InputError: the budget is below what the least ranks cost, or no size is good enough.
    """
    from svdconvert.factoring.edges import Edges
    from svdconvert.factoring.trials import Trials

    bench = bench_of(work)
    edges = Edges(bench, store) if work.request.allocation == "measured" else None
    chooser = _Chooser(work, plan, store, Trials(bench), edges)
    with processes.current().leader_first():  # the others find what the leader has measured
        chosen = chooser.choose()
    bench.tidy()
    trial = chosen.trial
    budget = MeasuredBudget(
        trial.kl,
        trial.added,
        trial.dense,
        trial.tokens,
        share=None if work.request.size.limit is None else chosen.share,
        sizes=tuple(chooser.sizes),
        rounds=tuple(chooser.rounds),
        rounded_to=work.request.size.width,
    )
    work.events.note(Sentence(str(budget)))
    return chosen.plan.targets, budget


def bench_of(work: Work) -> Bench:
    """Where the models of a conversion are measured: on its calibration text."""
    from svdconvert.factoring.decompositions import decompositions_key
    from svdconvert.factoring.sampled import Bench

    assert work.knowledge is not None, "a rule of the request"
    request = work.request
    return Bench(
        work.source,
        work.knowledge.text,
        decompositions_key(work.source, request.method, request.options, work.knowledge, work.device),
        folder=work.place / "trials",
        states=work.job / "trials",
        device=work.device,
        batch_size=work.knowledge.batch_size,
        events=work.events,
    )
