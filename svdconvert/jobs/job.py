"""Running any job that turns one checkpoint into another: convert, heal, densify, fold.

They differ in their steps and in the config they end with; everything between is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.jobs import model_files
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.own_files import FILES, JOB_FOLDER
from svdconvert.jobs.record import RECORD, REPORT, Origin, Record, read_record
from svdconvert.machine import processes
from svdconvert.machine.memory import peak_memory_bytes
from svdconvert.machine.timing import StageTime, StageTimes
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, files_here
from svdconvert.sentences import asked
from svdconvert.storage.differences import difference
from svdconvert.storage.disk import refuse_full
from svdconvert.storage.headers import file_layout
from svdconvert.storage.source import SAFE_INDEX, LocalSource, Source
from svdconvert.tensors import TensorInfo
from svdconvert.version import __version__

# Step -> what became of it.
Reports = Mapping[str, Mapping[str, Any]]

# (folder, content of its future config.json) -> what was found in the result, one sentence each.
Check = Callable[[Path, Mapping[str, Any]], Sequence[str]]


@dataclass(frozen=True)
class Job:
    """What is to be done, without where and how.

    Attributes:
        steps: what becomes of its tensors, in the order of its files.
        shards: weight files to write.
        config: config.json of the result.
        extra: further files of the result, by name.
        card: reports of the steps -> model card.
        details: reports of the steps -> what svdconvert.json says beyond settings and versions.
        page: record and its file -> ``report.html``; None for none.
        reads: the checkpoint whose tensors the steps take; None for the one that the job is of.
    """

    steps: Sequence[Step]
    shards: Mapping[str, Sequence[TensorInfo]]
    config: Mapping[str, Any]
    extra: Mapping[str, bytes]
    card: Callable[[Reports], str]
    details: Callable[[Reports], Mapping[str, Any]]
    page: Callable[[Record, Path], bytes] | None = None
    reads: Source | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        folder: the result.
        record: its svdconvert.json.
        seconds: wall time of this run.
        peak_memory_bytes: highest resident memory of the process so far, the self-check included.
        peak_device_bytes: highest memory allocated on the GPU; 0 on the CPU.
        resumed: computed steps that an earlier, interrupted run had done.
        already_done: the finished result was there before, nothing was computed.
        checks: what the self-check found, one sentence each.
    """

    folder: Path
    record: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int
    peak_device_bytes: int = 0
    resumed: int = 0
    already_done: bool = False
    checks: Sequence[str] = field(default_factory=tuple)


def run_job(
    command: str,
    source: Source,
    settings: Mapping[str, Any],
    prepare: Callable[[], Job],
    folder: Path,
    *,
    device: str,
    workers: int = 1,
    overwrite: bool = False,
    check: Check | None = None,
    events: Events | None = None,
) -> Outcome:
    """Do a job, or what is left of it; several processes (``machine/processes.py``) share the work.

    Args:
        command: name of the tool's command.
        source: the checkpoint that is read.
        settings: what the result depends on beside the source's content.
        prepare: makes the job, once the folder is ours; what it has to compute for that is its own to keep.
        folder: where the result goes.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        workers: matrices in work at the same time.
        overwrite: replace what the folder holds.
        check: checks the result, before its config.json is written.
        events: receiver of progress.

    Raises:
        InputError: the folder or the request cannot be used.
        JobError: it broke off; the same call continues it.
    """
    events, start = events or Events(), time.perf_counter()
    refuse_same_folder(source, folder)
    identity = _identity(source)
    everything = {
        "svdconvert": __version__,
        "command": command,
        **identity,
        **settings,
        "device": device.split(":")[0],
    }
    with ExitStack() as stack:
        output = _open(folder, everything, stack, overwrite=overwrite)
        if output.finished:
            events.note(f"{folder} already holds this result; nothing to compute")
            done = read_record(folder).to_json()
            return Outcome(folder, done, time.perf_counter() - start, peak_memory_bytes(), already_done=True)
        times = StageTimes()
        with times.measure("prepare", process=True):
            job = prepare()
        files = _promise(job, source, output)
        written = _write_weights(job, source, output, device=device, workers=workers, events=events, times=times)
        record: dict[str, Any] = {}
        checks: Sequence[str] = ()
        if output.group.leader:
            record = _write_model_files(command, source, job, output, files, written)
            checks = _check(check, folder, job, events)
            _refuse_changed(source, identity)
            model_files.write_config(output, job.config)
        record, checks = output.group.share((record, checks))
    return Outcome(
        folder,
        record,
        time.perf_counter() - start,
        peak_memory_bytes(),
        _peak_device_bytes(device),
        resumed=written.resumed,
        checks=checks,
    )


@dataclass(frozen=True)
class _Written:
    """The weight files of a job, complete.

    Attributes:
        reports: of its computed steps.
        resumed: how many of them an earlier run had done.
        digests: tensor -> digest of its data.
        timing: stages of each process.
    """

    reports: Reports
    resumed: int
    digests: Mapping[str, str]
    timing: Sequence[Mapping[str, StageTime]]


def _open(folder: Path, settings: Mapping[str, Any], stack: ExitStack, *, overwrite: bool) -> OutputFolder:
    """The output folder, entered for as long as the stack; one that holds the finished result is left alone."""
    group = processes.current()
    with group.leader_first():
        output = OutputFolder(folder, settings, overwrite=overwrite, group=group)
        if not output.finished:
            stack.enter_context(output)
        elif group.leader:
            # A kill between config.json and the end may have left something.
            output.tidy()
    return output


def _promise(job: Job, source: Source, output: OutputFolder) -> list[str]:
    """Names of all files that a job writes, once they are known to be ours to write and to fit on the disk."""
    index = [SAFE_INDEX] if len(job.shards) > 1 else []
    page = [] if job.page is None else [REPORT]
    files = sorted({*job.shards, *index, *source.side_files, *job.extra, *page, *FILES})
    if output.group.leader:
        output.promise(files)
        preflight_disk(output.folder, job, job.reads or source)
    return files


def _write_weights(
    job: Job,
    source: Source,
    output: OutputFolder,
    *,
    device: str,
    workers: int,
    events: Events,
    times: StageTimes,
) -> _Written:
    """Do the steps of a job that are left; the buffers for that are given up again."""
    import torch

    from svdconvert.jobs.pipeline import Pipeline

    pipeline = Pipeline(
        job.reads or source,
        job.steps,
        job.shards,
        output,
        device=torch.device(device),
        workers=workers,
        events=events,
        times=times,
    )
    reports = pipeline.run()
    timing = output.group.gather(times.stages(solve=workers))
    return _Written(reports, pipeline.resumed, pipeline.digests, timing)


def _peak_device_bytes(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0


def _write_model_files(
    command: str, source: Source, job: Job, output: OutputFolder, files: Sequence[str], written: _Written
) -> dict[str, Any]:
    """Write all that belongs to the weights but config.json. Returns the record."""
    record = Record(
        command=command,
        source=Origin.of(source),
        settings=output.settings,
        results=job.details(written.reports),
        files=files,
        tensors=dict(sorted(written.digests.items())),
        timing=written.timing,
    )
    card, told = job.card(written.reports), record.to_json()
    where = output.folder / RECORD
    # As it will be read: times are rounded when they are written.
    page = {} if job.page is None else {REPORT: job.page(Record.from_json(told, where), where)}
    model_files.write_model_files(output, source, job.shards, extra={**job.extra, **page}, card=card, record=told)
    return told


def _check(check: Check | None, folder: Path, job: Job, events: Events) -> Sequence[str]:
    """What the self-check found."""
    if check is None:
        return ()
    events.note("checking the result")
    events.progress("checking the result", 0, 0)
    return check(folder, job.config)


def _identity(source: Source) -> dict[str, Any]:
    """All of the source that a result depends on."""
    return {**source.identity(), **source.side_identity()}


def _refuse_changed(source: Source, before: Mapping[str, Any]) -> None:
    """See that what was read is one model: the source is what it was at the beginning.

    Raises:
        InputError: it was changed or replaced meanwhile.
    """
    changed = difference(before, _identity(source))
    if changed is not None:
        raise InputError(
            f"{source.where} was changed while it was read ({': '.join(changed)}), so the result would mix "
            f"two models; start again with {asked('overwrite', True)}"
        )


def refuse_same_folder(source: Source, folder: Path) -> None:
    """Never write into the folder that is read from."""
    if isinstance(source, LocalSource) and folder.resolve() == source.folder.resolve():
        raise InputError(f"{asked('out', folder)} is the source's own folder; give another one")


def preflight_disk(folder: Path, job: Job, source: Source) -> None:
    """Compare the room that the result needs with what is free.

    Raises:
        InputError: it does not fit.
    """
    needed = sum(
        file_layout(infos).size
        for name, infos in job.shards.items()
        # What an interrupted run has written or reserved is taken already.
        if not (folder / name).exists() and not (folder / JOB_FOLDER / f"{name}.partial").exists()
    )
    needed += sum(sorted(source.download_bytes.values())[-files_here(job.steps) :])
    refuse_full(folder, needed, "", f"free some or give another folder as {asked('out')}")
