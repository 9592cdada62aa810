"""The main job: a dense checkpoint in, a factored one out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

from svdconvert.calibration.knowledge import Calibration
from svdconvert.commands.budgets import with_ranks
from svdconvert.commands.byte_budgets import as_recorded
from svdconvert.commands.conversion_job import conversion_job
from svdconvert.commands.html_report import write_report
from svdconvert.commands.push import push
from svdconvert.commands.report import Report
from svdconvert.commands.stages import Prepared, prepare
from svdconvert.commands.work import Work, kept_work
from svdconvert.jobs.job import Outcome, run_job
from svdconvert.jobs.own_files import JOB_FOLDER, refuse_foreign
from svdconvert.jobs.record import REPORT
from svdconvert.layouts.table import DEFAULT_LAYOUT
from svdconvert.machine import processes
from svdconvert.machine.devices import resolve_device
from svdconvert.machine.threads import usual_workers
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.events import Events
from svdconvert.planning.fit import fitted
from svdconvert.planning.make import make_plan, plan_for
from svdconvert.planning.plan import Plan
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.size import INFERENCE
from svdconvert.solvers.table import DEFAULT_SOLVER, SOLVERS
from svdconvert.storage.disk import free_bytes
from svdconvert.storage.opening import open_source


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    params: str | int | None = None,
    bytes: str | float | None = None,
    widths: str | Sequence[int] | None = None,
    fit: str | int | None = None,
    fit_context: int | None = None,
    fit_for: str = INFERENCE,
    max_loss: float | None = None,
    max_kl: float | None = None,
    targets: Sequence[str] = (),
    method: str | None = None,
    dtype: str = "keep",
    device: str = "auto",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    factor_all: bool = False,
    rank_multiple: int = 1,
    calibration: Calibration | None = None,
    allocation: str | None = None,
    alpha: float | None = None,
    shrinkage: float | None = None,
    layout: str = DEFAULT_LAYOUT.name,
    share_layers: int = 1,
    share_experts: bool = False,
    split_fused: bool = False,
    solver: str = DEFAULT_SOLVER.name,
    refit: str = "none",
    stats: str | os.PathLike[str] | None = None,
    heal: bool = False,
    heal_calib: str | None = None,
    heal_samples: int | None = None,
    heal_epochs: float | None = None,
    work: str | os.PathLike[str] | None = None,
    keep_work: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    check: bool = True,
    report: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    hub_revision: str | None = None,
    events: Events | None = None,
) -> Report:
    """Factor a model and write the result as a checkpoint that AutoModelForCausalLM loads.

    An interrupted call goes on where it stopped when it is made again with the same arguments.

    Args:
        model, rank, keep, params, bytes, widths, fit, fit_context, fit_for, targets, dtype, max_shard_size, revision,
            factor_all, rank_multiple: see :func:`plan`.
        max_loss: instead of a size, the nats per token that the smallest size to be found may add to the model's loss,
            measured on held-out sequences of the calibration text. With a refit it is measured before that.
        max_kl: likewise the mean divergence KL(dense || converted), nats per token.
        method: row of :data:`svdconvert.methods.table.METHODS`; by default kfac where there is a text, else svd.
        out: folder to write.
        device: ``auto`` (cuda if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        calibration: the text that a data-aware method uses.
        allocation: ``uniform``, every matrix as the request says; ``global``, the same number of parameters where they
            help most; or ``measured``, which corrects that by what is measured on the compressed model, and of a few
            ways to spend bytes takes the one that is measured to be the nearest to the dense model. By default what the
            method does best with.
        alpha: exponent of asvd.
        shrinkage: how far kfac and whiten pull their metrics towards the diagonal, 0 to 1; by default 0.2 for kfac and
            0 for whiten, which then is SVD-LLM.
        layout: ``balanced``, two factors, or ``pivoted``, r rows of each matrix and the coefficients of the others,
            which buys more rank for the same size.
        share_layers: groups of so many consecutive layers have one input-side factor for each kind of matrix, which is
            stored once and buys more rank for the same size. A group is one matrix to ranks and budgets.
        share_experts: the same for all experts of a layer, of the matrices that read hidden states.
        split_fused: queries, keys and values that are one matrix (GPT-NeoX, Phi-3, GPT-2) are factored as three, each
            with a rank and a metric of its own; the checkpoint has three layers in the place of one.
        solver: ``exact``, or ``fast``: plain SVD on the CPU, where the rank is so low that it is at least 1.5 times as
            fast (:class:`svdconvert.solvers.fast.Fast`), by a filtered subspace whose error is estimated to be at most
            0.1 % above the least one (:mod:`svdconvert.linalg.filtered`); all other matrices are solved exactly, and
            those that miss this bound.
        refit: ``sequential`` fits the outer factors to the dense model on the inputs that the compressed layers before
            them give, see :mod:`svdconvert.factoring.refit`; ``none`` leaves the truncation as it is.
        stats: instead of a calibration, the folder that :func:`svdconvert.calibrate` has written.
        heal: train the factors, and the scales of weights in few bits, to the dense model's predictions in the end, as
            :func:`svdconvert.heal` does, on the text of ``calibration``.
        heal_calib: heal on another text, a path or a name as of a calibration; ``self`` for text that the dense model
            writes. Length, seed and batch size are those of ``calibration``.
        heal_samples: sequences to heal on; by default as many as of ``calibration``.
        heal_epochs: times that they are gone through; by default once.
        work: folder that keeps statistics and decompositions, so that another rank or budget of the same model and
            text starts from them; by default they live in the job's own folder and go with it.
        keep_work: short for a ``work`` folder beside ``out``, of the same name with ``-work`` added.
        overwrite: replace what the folder holds.
        workers: matrices solved at the same time; memory grows with it. None: one a core on the CPU, two on a GPU, as
            far as memory goes.
        check: run a few tokens through the result afterwards and check its logits.
        report: also write ``report.html``, a page about the result.
        push_to_hub: repository to upload the result to.
        private: make that repository private if it has to be created.
        hub_revision: branch to upload to.
        events: receiver of progress.

    Raises:
        InputError: nothing could be done.
        JobError: it broke off; the same call continues it.
    """
    keywords = dict(locals())  # the arguments, before anything else has a name here
    model, out, events = (keywords.pop(name) for name in ("model", "out", "events"))
    return run_conversion(model, out, Conversion.of(**keywords), events)


def run_conversion(
    model: str | os.PathLike[str], out: str | os.PathLike[str], request: Conversion, events: Events | None = None
) -> Report:
    """:func:`convert` by a typed request.

    Args:
        model, out, events: see :func:`convert`.
        request: what is asked for.

    Raises:
        InputError: nothing could be done.
        JobError: it broke off; the same call continues it.
    """
    events = events or Events()
    folder = user_path(out)
    pages = [REPORT] if request.output.report else []
    refuse_foreign(folder, overwrite=request.output.overwrite, more=pages)
    request.check()
    device = resolve_device(request.runtime.device)
    group = processes.current()
    if request.hub.push_to and group.leader:
        from svdconvert.storage.hub_push import check_push

        check_push(request.hub.push_to, private=request.hub.private, revision=request.hub.push_revision)
    source = open_source(
        path_or_text(model), request.hub.revision, download_folder=group.own(folder / JOB_FOLDER / "source")
    )
    settled = fitted(source, _as_the_device_can(request, device).settled())
    plan = make_plan(source, settled)
    if settled.recipe.solver != request.recipe.solver:
        plan = replace(plan, notes=(*plan.notes, SOLVERS[request.recipe.solver].cpu_only))
    if request.recipe.method not in (None, settled.recipe.method):
        events.note(f"{request.recipe.method} has the same optimum as {settled.recipe.method}, which computes it")
    from svdconvert.models.preflight import check_model

    check_model(source)
    from svdconvert.commands.heal_afterwards import convert_and_heal, with_texts

    work = with_texts(Work(source, settled, None, folder, device, events))
    if request.afterwards.heal:
        carried_out, outcome = convert_and_heal(work, plan, _run)
        plan = carried_out or _with_chosen_ranks(work, plan, outcome)
    else:
        plan, outcome = _run(work, plan)
    if request.runtime.keep_work and kept_work(folder).is_dir():
        events.note(Sentence(f"the decompositions are kept in {kept_work(folder)} ({asked('work')})"))
    if request.output.report and outcome.already_done and group.leader:
        write_report(folder)
    return Report(plan, outcome, _pushed(work))


def _as_the_device_can(request: Conversion, device: str) -> Conversion:
    """The request as it is carried out: some solvers are for CPUs."""
    if SOLVERS[request.recipe.solver].cpu_only and device != "cpu":
        return replace(request, recipe=replace(request.recipe, solver=DEFAULT_SOLVER.name))
    return request


def _run(work: Work, plan: Plan) -> tuple[Plan, Outcome]:
    """Do the job, or what is left of it; with the plan as it was carried out."""
    from svdconvert.commands.verify import self_check

    request, events = work.request, work.events
    if not work.chooses:
        events.planned(plan, free_bytes(work.folder))
    elif request.allocation == "global" and request.method.allocation != "global":
        events.note(
            Sentence(
                "a global budget compares singular values of all matrices, which those of "
                f"{request.method.name} are not made for; it often loses more than {asked('allocation', 'uniform')}"
            )
        )
    settings = request.key(None if work.knowledge is None else work.knowledge.key)
    with ExitStack() as held:

        @cache
        def prepared() -> Prepared:
            return prepare(work, plan, held)

        outcome = run_job(
            "convert",
            work.source,
            settings,
            lambda: conversion_job(work, prepared(), settings),
            work.folder,
            device=work.device,
            workers=request.runtime.workers or usual_workers(work.device, plan.solving_bytes, plan.device_bytes),
            overwrite=request.output.overwrite,
            check=self_check if request.output.check else None,
            events=events,
        )
    if not outcome.already_done:
        return prepared().plan, outcome
    return _with_chosen_ranks(work, plan, outcome), outcome


def _with_chosen_ranks(work: Work, plan: Plan, outcome: Outcome) -> Plan:
    """The plan with the ranks that an earlier run has chosen, if it chose any."""
    if not work.chooses:
        return plan
    if work.request.size.rounds:
        return plan_for(work.source, work.request, as_recorded(plan.targets, outcome.record))
    matrices = outcome.record["matrices"]
    ranks = [matrices.get(target.module, {}).get("rank") for target in plan.targets]
    return plan_for(work.source, work.request, with_ranks(plan.targets, ranks))


def _pushed(work: Work) -> str | None:
    """Upload the result, if that is asked for; gives where it is then."""
    hub, group = work.request.hub, processes.current()
    if not hub.push_to:
        return None
    work.events.note(f"uploading to {hub.push_to}")
    url = None
    if group.leader:
        url = push(work.folder, hub.push_to, private=hub.private, revision=hub.push_revision)
    return group.share(url)
