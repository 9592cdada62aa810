"""A conversion from its plan to its job: decompose, spend the budget, refit; each stage gives a new plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.calibration.knowledge import Knowledge
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.layouts.table import layout_named
from svdconvert.machine import processes
from svdconvert.planning.allocation import allocate
from svdconvert.planning.events import Events
from svdconvert.planning.make import plan_for
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.text import Stats
from svdconvert.storage import locks
from svdconvert.storage.disk import free_bytes
from svdconvert.storage.source import Source

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.refit_files import Refit


@dataclass(frozen=True)
class Work:
    """A conversion under way.

    Attributes:
        source: the dense model.
        request: what to do, settled.
        knowledge: the calibration text and its statistics, or None.
        folder: where the result goes.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        events: receiver of progress.
    """

    source: Source
    request: Conversion
    knowledge: Knowledge | None
    folder: Path
    device: str
    events: Events

    @property
    def kept(self) -> Path | None:
        """The folder that keeps statistics and decompositions for other runs; None for none."""
        return kept_work(self.folder) if self.request.runtime.keep_work else self.request.runtime.work

    @property
    def must_decompose(self) -> bool:
        """Whether the result is made from whole decompositions, kept or not."""
        recipe = self.request.recipe
        return bool(self.request.method.statistics) or recipe.allocation == "global" or recipe.refit != "none"

    @property
    def decomposes(self) -> bool:
        """Whether matrices are decomposed before they are truncated."""
        return self.must_decompose or self.kept is not None


@dataclass(frozen=True)
class Prepared:
    """A plan whose ranks are final and whose decompositions are there.

    Attributes:
        plan: the conversion.
        refit: how the refit ended; None without one.
    """

    plan: Plan
    refit: Refit | None = None


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
    if not work.decomposes:
        return Prepared(plan)
    store = _decompose(work, plan)
    targets: Sequence[Target] = plan.targets
    if work.request.allocation == "global":
        targets = spend(plan, work.request, store)
    plan = plan_for(work.source, work.request, targets, {target.module: store.options(target) for target in targets})
    if work.request.allocation == "global":
        work.events.planned(plan, free_bytes(work.folder))
    if work.request.recipe.refit == "none" or not plan.ranks:
        return Prepared(plan)
    return _refit(work, plan, store)


def _decompose(work: Work, plan: Plan) -> Decompositions:
    """The decompositions of all targets, in files."""
    from svdconvert.factoring.decompose import kept_decompositions

    return kept_decompositions(
        work.source,
        plan.targets,
        work.request.method,
        work.request.options,
        work.knowledge,
        work.kept or work.folder / JOB_FOLDER / "work",
        work.device,
        work.events,
        work.request.runtime.workers,
    )


def spend(plan: Plan, request: Conversion, store: Decompositions) -> list[Target]:
    """Ranks of a global budget: as many parameters as uniform ranks would take, spent where they help most.

    Raises:
        InputError: the budget is below what the least ranks cost.
    """
    targets = [replace(target, rank=None, reason="") for target in plan.targets]
    dense = sum(target.dense_params for target in targets)
    budget = request.size.budget(dense, plan.params_before - dense)
    if budget is None:
        budget = sum(target.params for target in plan.targets)
    ranks = allocate(
        targets,
        [store.spectrum(target).numpy() for target in targets],
        budget,
        cost=layout_named(request.recipe.layout).cost,
        multiple=request.size.multiple,
    )
    return with_ranks(targets, ranks)


def with_ranks(targets: Sequence[Target], ranks: Sequence[int | None]) -> list[Target]:
    """Targets with the ranks of a global budget; None keeps one dense."""
    return [
        replace(target, rank=rank, reason="" if rank is not None else "the budget keeps it whole")
        for target, rank in zip(targets, ranks, strict=True)
    ]


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


def measure(work: Work, plan: Plan) -> Mapping[str, float]:
    """Loss of the dense model on the text, and what the written weights add to it, in nats per token.

    Empty without a text, or if the result is not to be checked.
    """
    if work.knowledge is None or not work.request.output.check:
        return {}
    from svdconvert.factoring.measured import StoredMatrices, measure_losses

    factors = {step.key: [info.name for info in step.outputs] for step in plan.steps}
    written = {}
    for target in plan.targets:
        if target.rank is not None:
            first, *rest = factors[target.weight]
            for i, part in enumerate(target.parts):
                written[part.module] = [first, rest[i]] if target.followers else [first, *rest]
    dense, compressed = measure_losses(
        work.source,
        work.knowledge.text,
        StoredMatrices([work.folder / name for name in plan.shards], written, layout_named(work.request.recipe.layout)),
        work=work.folder / JOB_FOLDER / "measured",
        device=work.device,
        batch_size=work.knowledge.batch_size,
        events=work.events,
    )
    return {"dense_loss": dense.mean, "measured_loss": compressed.mean - dense.mean}


def kept_work(folder: Path) -> Path:
    """The folder that ``keep_work`` stands for."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-work")
