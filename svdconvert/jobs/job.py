"""Running any job that turns one checkpoint into another: convert, densify, fold.

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
from svdconvert.jobs.output import FILES, JOB_FOLDER, OutputFolder, read_record
from svdconvert.machine import processes
from svdconvert.machine.memory import peak_memory_bytes
from svdconvert.machine.timing import StageTimes
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, files_here
from svdconvert.sentences import asked
from svdconvert.storage.differences import difference
from svdconvert.storage.disk import refuse_full
from svdconvert.storage.headers import layout
from svdconvert.storage.source import SAFE_INDEX, LocalSource, Source
from svdconvert.tensors import TensorInfo
from svdconvert.version import __version__

Reports = Mapping[str, Mapping[str, Any]]


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
    """

    steps: Sequence[Step]
    shards: Mapping[str, Sequence[TensorInfo]]
    config: Mapping[str, Any]
    extra: Mapping[str, bytes]
    card: Callable[[Reports], str]
    details: Callable[[Reports], Mapping[str, Any]]


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
    check: Callable[[Path, Mapping[str, Any]], Sequence[str]] | None = None,
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
        check: (folder, config.json's content) -> what it found in the result, whose config.json is not written yet.
        events: receiver of progress.

    Raises:
        InputError: the folder or the request cannot be used.
        JobError: it broke off; the same call continues it.
    """
    events = events or Events()
    start = time.perf_counter()
    refuse_same_folder(source, folder)
    identity = {**source.identity(), **source.side_identity()}
    everything = {
        "svdconvert": __version__,
        "command": command,
        **identity,
        **settings,
        "device": device.split(":")[0],
    }
    group = processes.current()
    times = StageTimes()
    with ExitStack() as stack:
        with group.leader_first():
            output = OutputFolder(folder, everything, overwrite=overwrite, group=group)
            if not output.finished:
                stack.enter_context(output)
            elif group.leader:
                # A kill between config.json and the end may have left something.
                output.tidy()
        if output.finished:
            events.note(f"{folder} already holds this result; nothing to compute")
            seconds = time.perf_counter() - start
            return Outcome(folder, read_record(folder), seconds, peak_memory_bytes(), already_done=True)

        import torch

        from svdconvert.jobs.pipeline import Pipeline

        target = torch.device(device)
        with times.measure("prepare", process=True):
            job = prepare()
        if group.leader:
            files = _files(job, source)
            output.promise(files)
            preflight_disk(folder, job, source)
        pipeline = Pipeline(
            source, job.steps, job.shards, output, device=target, workers=workers, events=events, times=times
        )
        reports, resumed, digests = pipeline.run(), pipeline.resumed, pipeline.digests
        del pipeline  # its buffers, so that the check does not come on top of them
        stages = times.to_json()
        stages["solve"]["workers"] = workers
        timing = group.gather(stages)
        record: dict[str, Any] = {}
        checks: Sequence[str] = ()
        if group.leader:
            tensors = dict(sorted(digests.items()))
            details = {**job.details(reports), "files": files, "tensors": tensors, "timing": timing}
            record = model_files.record(command, source, everything, details)
            model_files.write_model_files(
                output, source, job.shards, extra=job.extra, card=job.card(reports), job_record=record
            )
            if check is not None:
                events.note("checking the result")
                events.progress("checking the result", 0, 0)
                checks = check(folder, job.config)
            _refuse_changed(source, identity)
            model_files.write_config(output, job.config)
        record, checks = group.share((record, checks))
    return Outcome(
        folder,
        record,
        time.perf_counter() - start,
        peak_memory_bytes(),
        torch.cuda.max_memory_allocated(target) if target.type == "cuda" else 0,
        resumed=resumed,
        checks=checks,
    )


def _files(job: Job, source: Source) -> list[str]:
    """All files that a job writes."""
    index = [SAFE_INDEX] if len(job.shards) > 1 else []
    return sorted({*job.shards, *index, *source.side_files, *job.extra, *FILES})


def _refuse_changed(source: Source, before: Mapping[str, Any]) -> None:
    """See that what was read is one model: the source is what it was at the beginning.

    Raises:
        InputError: it was changed or replaced meanwhile.
    """
    found = difference(before, {**source.identity(), **source.side_identity()})
    if found is not None:
        raise InputError(
            f"{source.where} was changed while it was read ({': '.join(found)}), so the result would mix two models; "
            f"start again with {asked('overwrite', True)}"
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
        layout(infos)[2]
        for name, infos in job.shards.items()
        # What an interrupted run has written or reserved is taken already.
        if not (folder / name).exists() and not (folder / JOB_FOLDER / f"{name}.partial").exists()
    )
    needed += sum(sorted(source.download_bytes.values())[-files_here(job.steps) :])
    refuse_full(folder, needed, "", f"free some or give another folder as {asked('out')}")
