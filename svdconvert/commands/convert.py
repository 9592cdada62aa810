"""The main job: a dense checkpoint in, a factored one out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.calibration.knowledge import (
    Calibration,
    Knowledge,
    check_knowledge,
    check_parts,
    default_method,
    find_knowledge,
)
from svdconvert.commands.conversion_job import command_line, conversion_job
from svdconvert.errors import InputError
from svdconvert.jobs.job import Job, Outcome, run_job
from svdconvert.jobs.own_files import JOB_FOLDER, refuse_foreign
from svdconvert.jobs.record import RECORD, read_record
from svdconvert.layouts.table import DEFAULT, layout_named
from svdconvert.machine import processes
from svdconvert.machine.devices import resolve_device
from svdconvert.machine.threads import usual_workers
from svdconvert.methods.table import method_named, method_options
from svdconvert.planning.allocation import allocate, chosen_allocation
from svdconvert.planning.events import Events
from svdconvert.planning.plan import Plan, make_plan
from svdconvert.planning.ranks import RankRequest, Target
from svdconvert.solvers import table as fast
from svdconvert.storage import locks
from svdconvert.storage.disk import free_bytes
from svdconvert.storage.opening import open_source
from svdconvert.storage.source import Source
from svdconvert.words import parse_size

if TYPE_CHECKING:
    from svdconvert.factoring.decompositions import Decompositions
    from svdconvert.factoring.refit_files import Refit

REFITS = ("none", "sequential")

# Of svdconvert.json, what a model has lost on its text.
LOSSES = ("predicted_loss", "dense_loss", "measured_loss", "refit")


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        plan: the conversion as planned.
        outcome: time, memory and record of the run.
        url: where the result was pushed to, or None.
    """

    plan: Plan
    outcome: Outcome
    url: str | None = None

    @property
    def folder(self) -> Path:
        """Where the result is."""
        return self.outcome.folder

    @property
    def matrices(self) -> Mapping[str, Mapping[str, Any]]:
        """Module path -> what svdconvert.json tells about the matrix.

        rank, shape ``[out, in]``, precision (of the eigenproblem), seconds; relative_error, ||W - BA|| / ||W|| of the
        stored factors, optimal_error, the same of the best product in the method's metrics, before rounding,
        energy_kept, 1 - relative_error^2; rounding_excess, what the storage type adds to the loss in the method's
        metrics, relative to what it is before rounding (of independent rounding errors), and for two factors basis,
        the one that was rounded (``singular vectors``, or a row of :data:`svdconvert.linalg.rounding.BASES`). Where the
        fast solver was tried: solver, ``filtered`` with its certificate, by how much the error before rounding is
        estimated to be above the least one at most, relative to it (optimal_error is then the least that this leaves
        possible),
        or ``exact``, where it could not be certified and the matrix was solved exactly. With decompositions:
        whole and lost, the sum of the squared singular values in the method's metrics and of those cut off. Where the
        second moments C of the layer's inputs are known (whiten, kfac): output_error, ||(W - BA) C^1/2|| / ||W C^1/2||,
        the relative error of its outputs on the calibration text, before rounding. Where the metrics are those of the
        loss (kfac): predicted_loss, the loss added, nats per token. Of a layer that uses the factor of another:
        shared_with, that other's module path.
        """
        matrices: Mapping[str, Mapping[str, Any]] = self.outcome.record["matrices"]
        return matrices

    @property
    def errors(self) -> list[float]:
        """Relative error of every factored matrix, Frobenius norm."""
        return [float(matrix["relative_error"]) for matrix in self.matrices.values()]

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types, for ``--json``."""
        outcome = self.outcome
        return {
            "folder": str(self.folder),
            "plan": self.plan.to_json(),
            "matrices": {name: dict(matrix) for name, matrix in self.matrices.items()},
            "seconds": round(outcome.seconds, 3),
            "peak_memory_bytes": outcome.peak_memory_bytes,
            "peak_device_bytes": outcome.peak_device_bytes,
            "resumed": outcome.resumed,
            "already_done": outcome.already_done,
            "settings": dict(outcome.record["settings"]),
            "losses": {name: outcome.record[name] for name in LOSSES if name in outcome.record},
            "checks": list(outcome.checks),
            "url": self.url,
        }


def plan(
    model: str | os.PathLike[str],
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    params: int | None = None,
    targets: Sequence[str] = (),
    method: str | None = None,
    dtype: str = "keep",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    factor_all: bool = False,
    rank_multiple: int = 1,
    layout: str = DEFAULT.name,
    share_layers: int = 1,
    split_fused: bool = False,
    solver: str = "exact",
) -> Plan:
    """What :func:`convert` would do, from config and headers alone.

    Args:
        model: local folder, ``owner/name`` on the Hub, or a short name such as ``polyglot-ko-3.8b``.
        rank: rank of every target, or pattern -> rank; the pattern ``*`` stands for all that no other names.
        keep: instead, the fraction of the target parameters to keep.
        params: instead, the parameters of the whole converted model.
        targets: patterns that choose among the linear layers; empty means all of them.
        method: row of :data:`svdconvert.methods.table.METHODS`, by default svd.
        dtype: ``keep``, ``float16``, ``bfloat16`` or ``float32``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        revision: branch, tag or commit on the Hub.
        factor_all: factor also where that saves nothing.
        rank_multiple: every rank is a multiple of it, 8 or 64 say, as matrix kernels like them; ranks of a budget are
            rounded down, and a rank that is none is refused.
        layout: how the products are stored, see :func:`convert`.
        share_layers: consecutive layers that share the input-side factor of each kind of matrix, see :func:`convert`.
        split_fused: factor queries, keys and values that are one matrix as three, see :func:`convert`.
        solver: ``exact`` or ``fast``, see :func:`convert`.

    Raises:
        InputError: the model or the request cannot be used; the message says why.
    """
    source = open_source(os.fspath(model), revision, need_weights=False)
    request = _request(rank, keep, params, factor_all, rank_multiple)
    return make_plan(
        source,
        request,
        method=method or "svd",
        targets=targets,
        dtype=dtype,
        layout=layout,
        share_layers=share_layers,
        split_fused=split_fused,
        solver=solver,
        max_shard_bytes=parse_size(max_shard_size),
    )


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | Mapping[str, int] | None = None,
    keep: float | None = None,
    params: int | None = None,
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
    layout: str = DEFAULT.name,
    share_layers: int = 1,
    split_fused: bool = False,
    solver: str = "exact",
    refit: str = "none",
    stats: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    keep_work: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    check: bool = True,
    push_to_hub: str | None = None,
    private: bool = False,
    hub_revision: str | None = None,
    events: Events | None = None,
) -> Report:
    """Factor a model and write the result as a checkpoint that AutoModelForCausalLM loads.

    An interrupted call goes on where it stopped when it is made again with the same arguments.

    Args:
        model, rank, keep, params, targets, dtype, max_shard_size, revision, factor_all, rank_multiple: see
            :func:`plan`.
        method: row of :data:`svdconvert.methods.table.METHODS`; by default kfac where there is a text, else svd.
        out: folder to write.
        device: ``auto`` (cuda if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        calibration: the text that a data-aware method looks at.
        allocation: ``uniform``, every matrix as the request says, or ``global``, the same number of parameters where
            they help most; by default what the method does best with.
        alpha: exponent of asvd.
        shrinkage: how far kfac and whiten pull their metrics towards the diagonal, 0 to 1; by default 0.2 for kfac and
            0 for whiten, which then is SVD-LLM.
        layout: ``balanced``, two factors, or ``pivoted``, r rows of each matrix and the coefficients of the others,
            which buys more rank for the same size.
        share_layers: groups of so many consecutive layers have one input-side factor for each kind of matrix, which is
            stored once and buys more rank for the same size. A group is one matrix to ranks and budgets.
        split_fused: queries, keys and values that are one matrix (GPT-NeoX, Phi-3, GPT-2) are factored as three, each
            with a rank and a metric of its own; the checkpoint has three layers in the place of one.
        solver: ``exact``, or ``fast``: plain SVD on the CPU, where the rank is so low that it is at least 1.5 times as
            fast (:class:`svdconvert.solvers.fast.Fast`), by a filtered subspace whose error is estimated to be at most
            0.1 % above the least one (:mod:`svdconvert.linalg.filtered`); all other matrices are solved exactly, and
            those that miss this bound.
        refit: ``sequential`` fits the outer factors to the dense model on the inputs that the compressed layers before
            them give, see :mod:`svdconvert.factoring.refit`; ``none`` leaves the truncation as it is.
        stats: instead of a calibration, the folder that :func:`svdconvert.calibrate` has written.
        work: folder that keeps statistics and decompositions, so that another rank or budget of the same model and
            text starts from them; by default they live in the job's own folder and go with it.
        keep_work: short for a ``work`` folder beside ``out``, of the same name with ``-work`` added.
        overwrite: replace what the folder holds.
        workers: matrices solved at the same time; memory grows with it. None: one a core on the CPU, two on a GPU, as
            far as memory goes.
        check: run a few tokens through the result afterwards and look at its logits.
        push_to_hub: repository to upload the result to.
        private: make that repository private if it has to be created.
        hub_revision: branch to upload to.
        events: receiver of progress.

    Raises:
        InputError: nothing could be done.
        JobError: it broke off; the same call continues it.
    """
    events = events or Events()
    folder = Path(out).expanduser()
    refuse_foreign(folder, overwrite=overwrite)
    request = _request(rank, keep, params, factor_all, rank_multiple)
    max_shard_bytes = parse_size(max_shard_size)
    method = default_method(method, calibration, stats)
    row = method_named(method)
    options = method_options(row, {"alpha": alpha, "shrinkage": shrinkage})
    spread = chosen_allocation(row, allocation, request)
    if refit not in REFITS:
        raise InputError(f"--refit {refit!r} is unknown; choose {' or '.join(REFITS)}")
    if refit != "none" and share_layers != 1:
        raise InputError(f"--refit {refit} does not go with --share-layers; leave one of them out")
    check_knowledge(row, calibration, stats, refit=refit)
    check_parts(row, collected=stats is not None, split_fused=split_fused)
    fast.check_solver(
        solver,
        row.name,
        share_layers=share_layers,
        allocation=spread,
        refit=refit,
        keeps=keep_work or work is not None,
    )
    if keep_work and work is not None:
        raise InputError(f"give either --keep-work, which keeps them in {kept_work(folder)}, or --work FOLDER")
    used_device = resolve_device(device)
    refused_fast = solver == "fast" and used_device != "cpu"
    group = processes.current()
    if push_to_hub and group.leader:
        from svdconvert.storage.hub_push import check_push

        check_push(push_to_hub, private=private, revision=hub_revision)
    source = open_source(os.fspath(model), revision, download_folder=group.own(folder / JOB_FOLDER / "source"))
    planned: dict[str, Any] = {
        "targets": targets,
        "dtype": dtype,
        "layout": layout,
        "share_layers": share_layers,
        "split_fused": split_fused,
        "solver": "exact" if refused_fast else solver,
        "max_shard_bytes": max_shard_bytes,
    }
    if method != row.name:
        events.note(f"{method} has the same optimum as {row.name}, which computes it")
    made = make_plan(source, request, method=row.name, **planned)
    if refused_fast:
        made = replace(made, notes=(*made.notes, fast.NOT_ON_A_GPU))
    from svdconvert.commands.verify import self_check
    from svdconvert.models.preflight import check_model

    check_model(source)
    settings = {**made.settings, "allocation": spread, "refit": refit, **options}
    knowledge = find_knowledge(source, calibration, stats, events)
    if knowledge is not None:
        settings |= knowledge.key
    place = kept_work(folder) if keep_work else None if work is None else Path(work).expanduser()
    always_decomposed = bool(row.statistics) or spread == "global" or refit != "none"
    needs_decomposition = always_decomposed or place is not None
    if spread == "uniform":
        events.planned(made, free_bytes(folder))
    elif row.allocation != "global":
        events.note(
            f"a global budget compares singular values of all matrices, which those of {row.name} are not made for; "
            "it often loses more than --allocation uniform"
        )

    told: dict[str, Any] = {}

    def prepare() -> Job:
        nonlocal made
        if place is not None:
            held.enter_context(locks.working(place))
        if stats is not None:
            held.enter_context(locks.collected(Path(stats).expanduser()))
        if needs_decomposition:
            from svdconvert.factoring.decompose import kept_decompositions

            kept = place or folder / JOB_FOLDER / "work"
            store = kept_decompositions(
                source, made.targets, row, options, knowledge, kept, used_device, events, workers
            )
            ranked = spend(made, request, store) if spread == "global" else made.targets
            files = {target.module: store.options(target) for target in ranked}
            chosen: dict[str, Any] = {"method": row.name, "ranked": ranked, "decompositions": files, **planned}
            made = make_plan(source, request, **chosen)
            if spread == "global":
                events.planned(made, free_bytes(folder))
            if refit != "none" and made.ranks:
                assert knowledge is not None
                found, refitted = _refit(source, made, knowledge, folder / JOB_FOLDER, used_device, events)
                told["refit"] = asdict(found)
                if found.accepted:
                    made = make_plan(source, request, refitted=refitted, **chosen)
        measure = None
        if knowledge is not None and check:
            measure = partial(_measured, source, made, knowledge, folder, used_device, events)
        command = command_line(
            source, made, settings, request, knowledge, keeps=not always_decomposed and place is not None
        )
        return conversion_job(source, made, settings, row, command, told, measure)

    with ExitStack() as held:
        outcome = run_job(
            "convert",
            source,
            settings,
            prepare,
            folder,
            device=used_device,
            workers=workers or usual_workers(used_device, made.peak_bytes, made.device_bytes),
            overwrite=overwrite,
            check=self_check if check else None,
            events=events,
        )
    if outcome.already_done and spread == "global":  # the ranks that an earlier run has chosen
        matrices = outcome.record["matrices"]
        ranked = with_ranks(made.targets, [matrices.get(target.module, {}).get("rank") for target in made.targets])
        made = make_plan(source, request, method=row.name, ranked=ranked, **planned)
    if keep_work and kept_work(folder).is_dir():
        events.note(f"the decompositions are kept in {kept_work(folder)} (--work)")
    url = None
    if push_to_hub:
        events.note(f"uploading to {push_to_hub}")
        if group.leader:
            url = push(folder, push_to_hub, private=private, revision=hub_revision)
        url = group.share(url)
    return Report(made, outcome, url)


def _refit(
    source: Source,
    made: Plan,
    knowledge: Knowledge,
    own: Path,
    device: str,
    events: Events,
) -> tuple[Refit, dict[str, str]]:
    """How the sequential refit of a planned conversion ended, and the files with its factors."""
    from svdconvert.factoring.refit import refit_targets

    with processes.current().leader_first():  # one layer after the other: the leader's work alone
        found, folder = refit_targets(
            source,
            made.targets,
            made.steps,
            knowledge.text,
            own / "refit",
            work=own / "refit-states",
            device=device,
            batch_size=knowledge.batch_size,
            events=events,
        )
    events.note(str(found))
    return found, {module: str(folder.path(module)) for module in made.ranks}


def _measured(
    source: Source, made: Plan, knowledge: Knowledge, folder: Path, device: str, events: Events
) -> dict[str, float]:
    """Loss of the dense model on the calibration text, and what the written weights add to it, in nats per token."""
    from svdconvert.factoring.measured import StoredMatrices, measure_losses

    factors = {step.key: [info.name for info in step.outputs] for step in made.steps}
    written = {}
    for target in made.targets:
        if target.rank is not None:
            first, *rest = factors[target.weight]
            for i, part in enumerate(target.parts):
                written[part.module] = [first, rest[i]] if target.followers else [first, *rest]
    dense, compressed = measure_losses(
        source,
        knowledge.text,
        StoredMatrices([folder / name for name in made.shards], written, layout_named(made.settings["layout"])),
        work=folder / JOB_FOLDER / "measured",
        device=device,
        batch_size=knowledge.batch_size,
        events=events,
    )
    return {"dense_loss": dense.mean, "measured_loss": compressed.mean - dense.mean}


def kept_work(folder: Path) -> Path:
    """The folder that ``keep_work`` stands for."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-work")


def push(folder: str | os.PathLike[str], repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a finished result.

    Args:
        folder: what :func:`convert`, ``densify`` or ``fold`` wrote.
        repo: ``owner/name`` on the Hub; created if it does not exist.
        private: make it private if it has to be created.
        revision: branch to upload to.

    Returns:
        Where it is now.

    Raises:
        InputError: the folder is not finished, or the repository may not be written.
        JobError: the upload broke off; the same call continues it.
    """
    from svdconvert.storage.hub_push import check_push, push_folder

    path = Path(folder).expanduser()
    if not (path / "config.json").is_file() or not (path / RECORD).is_file():
        raise InputError(f"{path} holds no finished result of svdconvert; convert a model into it first")
    check_push(repo, private=private, revision=revision)
    name = read_record(path).source.name
    return push_folder(path, repo, private=private, revision=revision, message=f"Add {name}, factored by svdconvert")


def spend(made: Plan, request: RankRequest, store: Decompositions) -> list[Target]:
    """Ranks of a global budget: the parameters that the request's uniform ranks would take, spent where they help most.

    Raises:
        InputError: the budget is below what the least ranks cost.
    """
    targets = [replace(target, rank=None, reason="") for target in made.targets]
    budget = request.budget(targets, made.params_before - sum(target.dense_params for target in targets))
    if budget is None:
        budget = sum(target.params for target in made.targets)
    ranks = allocate(
        targets,
        [store.spectrum(target).numpy() for target in targets],
        budget,
        cost=layout_named(made.settings["layout"]).cost,
        multiple=request.multiple,
    )
    return with_ranks(targets, ranks)


def with_ranks(targets: Sequence[Target], ranks: Sequence[int | None]) -> list[Target]:
    """Targets with the ranks of a global budget; None keeps one dense."""
    return [
        replace(target, rank=rank, reason="" if rank is not None else "the budget keeps it whole")
        for target, rank in zip(targets, ranks, strict=True)
    ]


def _request(
    rank: int | Mapping[str, int] | None, keep: float | None, params: int | None, factor_all: bool, multiple: int
) -> RankRequest:
    patterns = dict(rank) if isinstance(rank, Mapping) else {}
    default = patterns.pop("*", None) if isinstance(rank, Mapping) else rank
    return RankRequest(default, patterns, keep, params, factor_all, multiple)
