"""The factors of a compressed model trained to the dense model's predictions."""

from __future__ import annotations

import os
from collections.abc import Sequence

from svdconvert.calibration.knowledge import Calibration, find_knowledge
from svdconvert.commands.healed_card import healed_card
from svdconvert.commands.healing_job import as_stored, healed_steps, healing_details
from svdconvert.commands.verify import self_check
from svdconvert.errors import InputError
from svdconvert.families.table import Architecture, factored_architecture
from svdconvert.healing.healing import heal_factors, result_file
from svdconvert.healing.matrices import dense_matrices
from svdconvert.healing.outcome import Healed
from svdconvert.healing.precision import precision_of
from svdconvert.healing.work import HealingWork
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Outcome, refuse_same_folder, run_job
from svdconvert.jobs.own_files import JOB_FOLDER, refuse_foreign
from svdconvert.jobs.record import RECORD
from svdconvert.layouts.table import layout_of
from svdconvert.machine import processes
from svdconvert.machine.devices import resolve_device
from svdconvert.models.index_tensors import refuse_unsound
from svdconvert.models.preflight import check_model
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, shard
from svdconvert.planning.whole import whole_steps
from svdconvert.sentences import Sentence, printable
from svdconvert.settings.healing import HealRequest
from svdconvert.storage.documents import json_or_none
from svdconvert.storage.opening import open_source
from svdconvert.storage.source import LocalSource, Source
from svdconvert.storage.tying import head_copies
from svdconvert.tensors import parameters


def heal(
    model: str | os.PathLike[str],
    against: str | os.PathLike[str],
    calibration: Calibration,
    out: str | os.PathLike[str],
    *,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    anchor: float = 0.0,
    hints: float = 0.0,
    precision: str = "auto",
    how: str = "end-to-end",
    against_revision: str | None = None,
    device: str = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    check: bool = True,
    events: Events | None = None,
) -> Outcome:
    """Train the factors of a compressed model to the predictions of the dense one, and write the result.

    The factors alone are trained: rows that a pivoted matrix keeps are factors, their places and all other tensors stay
    as they are. Of weights that are packed integers the scales are trained, and the integers stay. What is minimised is
    KL(dense || model), and every eighth sequence of the text, up to 8,192 tokens, is held out to judge by; if training
    brings nothing there, the result has the tensors as they were. An interrupted call goes on where it stopped when it
    is made again with the same arguments.

    Args:
        model: folder of a factored checkpoint.
        against: the dense model that it was made from: a folder, a GGUF file, or a model on the Hub.
        calibration: the text; ``batch_size`` of it is the number of sequences in memory at a time.
        out: folder to write.
        epochs: times that the text is gone through; once if neither this nor ``steps`` is given.
        steps: instead, steps of the optimiser.
        batch_size: sequences of a step; by default as many as have 2048 tokens.
        lr: highest learning rate; by default one between 3e-5 and 1e-3, by three short trials.
        anchor: pull of the factors towards their start: so many times the learning rate of the distance at each step.
        hints: weight of the distance to the dense model's hidden states at four depths, each token's relative to its
            length, beside the divergence of predictions, such as 10. It does not go with ``blocks``.
        precision: ``float32`` or ``bfloat16``, type of the matrix products in training; ``auto`` for bfloat16 where the
            device computes in it. What is trained, and what decides in the end, is float32.
        how: ``end-to-end``, the whole model at once, or ``blocks``, one after the other, each to the outputs of the
            dense model's (:mod:`svdconvert.healing.block_by_block`).
        against_revision: branch, tag or commit of the dense model on the Hub.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        overwrite: replace what the folder holds.
        check: run a few tokens through the result afterwards and check its logits.
        events: receiver of progress.

    Returns:
        How it ended; ``healing`` of the record tells what it was worth.

    Raises:
        InputError: a model, the text or the folder cannot be used, or the two models do not belong together.
        JobError: it broke off; the same call continues it.
    """
    request = HealRequest.of(
        calibration,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        anchor=anchor,
        hints=hints,
        precision=precision,
        how=how,
        device=device,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        check=check,
    )
    return run_healing(model, against, out, request, against_revision, events or Events())


def run_healing(
    model: str | os.PathLike[str],
    against: str | os.PathLike[str],
    out: str | os.PathLike[str],
    request: HealRequest,
    against_revision: str | None,
    events: Events,
) -> Outcome:
    """:func:`heal` by a typed request; the arguments are those."""
    folder, start = user_path(out), user_path(model)
    refuse_foreign(folder, overwrite=request.output.overwrite)
    request.check()
    if not start.is_dir():
        raise InputError(f"there is no folder {start}")
    device = resolve_device(request.runtime.device)
    source = LocalSource(start)
    row = factored_architecture(source.config, source.where)
    refuse_same_folder(source, folder)
    dense = open_source(
        path_or_text(against), against_revision, download_folder=processes.current().own(folder / JOB_FOLDER / "source")
    )
    refuse_same_folder(dense, folder)
    work = folder / JOB_FOLDER / "work"
    steps = whole_steps(source, healed_steps(source, row, result_file(work / "heal")))
    dense_matrices(source, dense)
    precision = precision_of(request.healing.precision, device)
    for one in (source, dense):
        check_model(one)
    for note in (*source.notes, *dense.notes, *_stranger(source, dense)):
        events.note(note)
    knowledge = find_knowledge(dense, request.calibration, events, folder=work, device=device)
    assert knowledge is not None
    text = {name: value for name, value in knowledge.key.items() if name != "labels"}
    settings = {
        **request.key(text, str(precision).removeprefix("torch.")),
        "layout": layout_of(source.config).name,
        "against": dense.identity(),
    }

    def prepare() -> Job:
        refuse_unsound(source, row)
        healing = HealingWork(source, dense, knowledge.text, request, work / "heal", device, precision, events)
        healed = heal_factors(healing)
        events.note(Sentence(str(healed)))
        return _job(healing, row, steps, healed, request.command(knowledge.repeatable))

    return run_job(
        "heal",
        source,
        settings,
        prepare,
        folder,
        device=device,
        overwrite=request.output.overwrite,
        check=self_check if request.output.check else None,
        events=events,
    )


def _job(work: HealingWork, row: Architecture, steps: Sequence[Step], healed: Healed, command: str) -> Job:
    """The job that writes trained factors."""
    source, dense = work.source, work.dense
    outputs = [info for step in steps for info in step.outputs]
    params, start = _parameters(source, row), _start_command(source)
    starts = [] if start is None else [start]
    told = healing_details(work, healed)
    details = told if start is None else {**told, "healing": {**told["healing"], "start": start}}
    return Job(
        steps=steps,
        shards=shard(outputs, work.request.output.max_shard_bytes),
        config=model_files.written_config(source, source.config),
        extra=model_files.code_files(source, row),
        card=lambda reports: healed_card(source, dense, row, [*starts, command], healed, params),
        details=lambda reports: {"params": params, **details, "repeat": command},
        reads=as_stored(source),
    )


def _parameters(source: LocalSource, row: Architecture) -> int:
    """Parameters of the model; of packed weights their entries."""
    copies = head_copies(row, source)
    beside = () if source.whole is None else source.whole.rest.values()
    return parameters([*beside, *(info for info in source.tensors.values() if info not in copies)])


def _start_command(source: LocalSource) -> str | None:
    """The commands that made the model which is healed, as far as its record has them."""
    record = json_or_none(source.folder / RECORD) or {}
    healing = record.get("healing")  # where it was healed before, the command alone would not be all
    found = [healing.get("start") if isinstance(healing, dict) else None, record.get("repeat")]
    return printable(" && ".join(one for one in found if isinstance(one, str))) or None


def _stranger(source: LocalSource, dense: Source) -> list[Sentence]:
    """A note where the model was made from other files than the dense one has; a teacher may be another on purpose."""
    settings = (json_or_none(source.folder / RECORD) or {}).get("settings")
    known = settings if isinstance(settings, dict) else {}
    made_from = known["against"] if isinstance(known.get("against"), dict) else known
    weights = made_from.get("weights"), dense.identity().get("weights")
    if None in weights or weights[0] == weights[1]:  # not told, or of another kind, as on the Hub
        return []
    return [
        Sentence(
            f"{source.folder} was made from other weight files than those of {dense.where}, to whose predictions it is "
            "trained; `svdconvert verify` compares the two"
        )
    ]
