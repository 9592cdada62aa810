"""A conversion from its plan to its job: decompose, spend the budget, refit; each stage gives a new plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from svdconvert.commands.budgets import spend
from svdconvert.commands.measured_budgets import MeasuredBudget, check_sequences, measured_ranks
from svdconvert.commands.measured_bytes import spend_bytes
from svdconvert.commands.work import Work
from svdconvert.families.table import dense_architecture
from svdconvert.grids import weights_of
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.layouts.table import layout_named
from svdconvert.machine import processes
from svdconvert.planning.bits import at_one_width
from svdconvert.planning.make import plan_for
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target
from svdconvert.settings.text import Stats
from svdconvert.storage import locks
from svdconvert.storage.disk import free_bytes
from svdconvert.storage.packed_config import FIELD, quantization_config
from svdconvert.storage.source import Source

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.refit_files import Refit


@dataclass(frozen=True)
class Prepared:
    """A plan whose ranks are final and whose decompositions are there.

    Attributes:
        plan: the conversion.
        refit: how the refit ended; None without one.
        budget: what was measured to choose the ranks; None where nothing was.
        worths: module path -> what its loss in the metrics is to be multiplied with; of a budget of bytes alone.
    """

    plan: Plan
    refit: Refit | None = None
    budget: MeasuredBudget | None = None
    worths: Mapping[str, float] = field(default_factory=dict)


def prepare(work: Work, plan: Plan, held: ExitStack) -> Prepared:
    """Run the stages that a request asks for, up to the plan that the job carries out.

    Args:
        work: the conversion.
        plan: the plan made from headers alone.
        held: keeps locks on folders until the job is done.

    Raises:
        InputError: see :func:`svdconvert.convert`.
    """
    if work.kept is not None:
        held.enter_context(locks.working(work.kept))
    if isinstance(work.request.calibration, Stats):
        held.enter_context(locks.collected(work.request.calibration.folder))
    if work.knowledge is not None:
        _ = work.knowledge.text  # one that the model writes is written by all processes, so here
    if not work.decomposes:
        return Prepared(plan)
    check_sequences(work)
    store = decompose(work, plan)
    targets: Sequence[Target] = plan.targets
    budget: MeasuredBudget | None = None
    worths: Mapping[str, float] = {}
    if work.request.size.bytes is not None:
        chosen, budget = spend_bytes(work, plan, store)
        targets = [one.target for one in chosen]
        worths = {one.target.module: one.worth for one in chosen}
    elif work.measures:
        targets, budget = measured_ranks(work, plan, store)
    elif work.chooses:
        targets = spend(plan, work.request.size, store)
    targets = at_one_width(targets, work.request.size)
    plan = plan_for(work.source, work.request, targets, store.files(targets))
    if work.chooses:
        work.events.planned(plan, free_bytes(work.folder))
    if work.request.recipe.refit == "none" or not plan.ranks:
        return Prepared(plan, budget=budget, worths=worths)
    return replace(_refit(work, plan, store), budget=budget)


def decompose(work: Work, plan: Plan) -> Decompositions:
    """The decompositions of all targets, in files."""
    from svdconvert.factoring.decompose import kept_decompositions

    return kept_decompositions(
        work.source,
        plan.targets,
        work.request.method,
        work.request.options,
        work.knowledge,
        work.place,
        work.device,
        work.events,
        work.request.runtime.workers,
        whole=work.request.size.rounds,
    )


def _refit(work: Work, plan: Plan, store: Decompositions) -> Prepared:
    """Fit the outer factors to the dense model; the plan uses them if they are better."""
    from svdconvert.factoring.refit import refit_targets

    assert work.knowledge is not None, "a rule of the request"
    own = work.folder / JOB_FOLDER
    with processes.current().leader_first():  # one layer after the other: the leader's work alone
        refit, folder = refit_targets(
            work.source,
            plan.targets,
            plan.steps,
            work.knowledge.text,
            own / "refit",
            work=own / "refit-states",
            device=work.device,
            batch_size=work.knowledge.batch_size,
            events=work.events,
        )
    work.events.note(str(refit))
    if not refit.accepted:
        return Prepared(plan, refit)
    files = {
        target.module: {**store.options(target), "refitted": str(folder.path(target.module))}
        for target in plan.targets
        if target.rank is not None
    }
    return Prepared(plan_for(work.source, work.request, plan.targets, files), refit)


def packed_fields(source: Source, plan: Plan) -> dict[str, Any]:
    """Fields of the result's config.json that say which weights are packed; none where none are."""
    if not plan.grids:
        return {}
    outputs = [info for step in plan.steps for info in step.outputs]
    row = dense_architecture(source.config, source.where)
    return {FIELD: quantization_config(plan.grids, outputs, row, source.whole)}


def measure(work: Work, plan: Plan) -> Mapping[str, float]:
    """Loss of the dense model on the text, and what the written weights add to it, in nats per token.

    Empty without a text, or if the result is not to be checked.
    """
    if work.knowledge is None or not work.request.output.check:
        return {}
    from svdconvert.factoring.measured import StoredMatrices, measure_losses

    factors = {step.key: [info.name for info in step.outputs] for step in plan.steps}
    written: dict[str, list[str]] = {}
    whole: dict[str, str] = {}
    for target in plan.targets:
        if target.rounded and target.rank is None:
            (whole[target.module],) = weights_of(factors[target.weight])
        elif target.rounded:
            written[target.module] = weights_of(factors[target.weight])
        elif target.rank is not None:
            first, *rest = factors[target.weight]
            for i, part in enumerate(target.parts):
                written[part.module] = [first, rest[i]] if target.followers else [first, *rest]
    dense, compressed = measure_losses(
        work.source,
        work.knowledge.text,
        StoredMatrices(
            [work.folder / name for name in plan.shards],
            written,
            layout_named(work.request.recipe.layout),
            packed_fields(work.source, plan),
            whole,
            work.source.whole,
        ),
        work=work.folder / JOB_FOLDER / "measured",
        device=work.device,
        batch_size=work.knowledge.batch_size,
        events=work.events,
        known=work.knowledge.dense_loss(),
    )
    return {"dense_loss": dense.mean, "measured_loss": compressed.mean - dense.mean}
