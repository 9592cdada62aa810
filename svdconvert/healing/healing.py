"""Healing: factors and scales of a compressed model trained to the predictions of the dense one.

What is minimised is the mean over the predicted tokens of KL(dense || compressed) (Hinton et al., arXiv:1503.02531, at
temperature 1), which is 0 only where both predict the same. A text's own next tokens play no part: fitted to those, a
model learns the text by heart and gets a lower perplexity without being a better copy.

Beside it hidden states at four depths can be brought towards the dense model's (``healing/distance.py``). What decides
is the divergence alone.

The dense model is run once, block by block, and its hidden states lie in files. The compressed one is in memory,
in float32, packed integers aside (``healing/grid_weights.py``), with gradients of all that is trained and what
is kept of earlier ones (``healing/optimiser.py``).
Every eighth sequence is held out, up to 8,192 tokens (``healing/sequences.py``); what has the least divergence there,
rounded as it is stored, is the result, and the start is one of the candidates.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.healing.block_by_block import heal_blocks
from svdconvert.healing.distance import NO_HINTS, Hints, compared_blocks
from svdconvert.healing.matrices import healed_matrices
from svdconvert.healing.memory import check_memory
from svdconvert.healing.objective import Diverged, Objective
from svdconvert.healing.outcome import Healed, Judged, read_healed, write_healed
from svdconvert.healing.sequences import Order, judges
from svdconvert.healing.state import StateFile
from svdconvert.healing.student import Student
from svdconvert.healing.teacher import SharedTeacher, States, Teacher, teacher_head
from svdconvert.healing.trained import trained_numbers, trained_tensors
from svdconvert.healing.training import Texts, Training
from svdconvert.healing.work import BLOCKS, STATE, STATES, HealingWork
from svdconvert.machine import processes
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.head_divergence import HeadDivergence
from svdconvert.planning.healing_needs import training_bytes
from svdconvert.sentences import asked


def result_file(folder: Path) -> Path:
    """The file of the factors, in the folder of a healing."""
    return folder / "healed.safetensors"


def heal_factors(work: HealingWork) -> Healed:
    """Train the factors, or do what is left of it; they are in a file then.

    Raises:
        InputError: a model or the text cannot be used.
        JobError: the disk fails; the same call goes on.
    """
    result, group = result_file(work.folder), processes.current()
    healed = group.share(read_healed(result) if group.leader else None)
    if healed is None:
        healed, factors = (heal_blocks if work.request.healing.how == "blocks" else _trained)(work)
        if group.leader:
            write_healed(result, healed, factors)
        group.wait()
    if not group.leader:
        return healed
    # Not needed any more; what cannot be removed now is removed with the job.
    for name in (STATES, BLOCKS):
        shutil.rmtree(work.folder / name, ignore_errors=True)
    with suppress(OSError):
        (work.folder / STATE).unlink(missing_ok=True)
    return healed


def _trained(work: HealingWork) -> tuple[Healed, Mapping[str, Tensor]]:
    """How it ended, and the factors as they are to be stored."""
    tokens, group = work.tokens, processes.current()
    held_out = judges(tokens)
    source = work.source
    needed = training_bytes(source.tensors.values(), trained_tensors(source), source.packed)
    check_memory(needed, source.where, work.device)
    others = torch.ones(len(tokens.ids), dtype=torch.bool)
    others[held_out] = False
    blocks = ModelBlocks(work.dense, device=work.device)

    weight = work.request.healing.hints
    hints = Hints(weight, compared_blocks(blocks.count)) if weight else NO_HINTS

    def teacher(name: str, sequences: Tensor, precision: torch.dtype, behind: Sequence[int] = ()) -> SharedTeacher:
        at_a_time = work.request.calibration.batch_size

        def part(numbers: Tensor, file: str) -> Teacher:
            place = work.folder / STATES / file
            return Teacher(
                blocks, tokens, numbers, place, work.key, batch_size=at_a_time, precision=precision, behind=behind
            )

        return SharedTeacher(sequences, part, work.events, name)

    batch = work.batch
    train = teacher("training", others.nonzero()[:, 0], work.precision, hints.blocks)
    judging = teacher("held-out", held_out, torch.float32)
    texts = Texts(train, judging, Order(train.sequences, batch, work.request.calibration.seed))
    student = Student(work.source, work.device, work.precision)
    with teacher_head(blocks, student.head) as head:
        objective = Objective(student, head, tokens, work.request.calibration.batch_size, work.precision, hints)
        before = _first(work, objective, judging)
        training = Training(
            objective,
            texts,
            work.request.healing.lr,
            work.request.healing.total_steps(len(train.sequences), batch),
            work.request.healing.anchor,
            StateFile(work.folder / STATE, {**work.key, "start": work.source.identity(), "processes": group.size}),
            work.events,
        )
        try:
            training.run()
        except Diverged:  # only the start's predictions get here
            raise InputError(
                f"{work.source.where} gives NaN or infinite logits in {work.precision}; use "
                f"{asked('precision', 'float32')}"
            ) from None
        after, factors = before, dict(student.start)
        if training.best is not None:
            student.put(training.best)
            found = _measured(work, objective, judging)
            if found is not None and found.kl < before.kl:
                after, factors = found, training.best
    told = _told(work, training, batch, before, after, factors) if group.leader else None
    healed: Healed = group.share(told)  # type: ignore[assignment]
    return healed, factors


def _first(work: HealingWork, objective: Objective, judging: States) -> HeadDivergence:
    """The start on the held-out sequences.

    Raises:
        InputError: it gives no finite numbers.
    """
    found = _measured(work, objective, judging)
    if found is None:
        raise InputError(f"{work.source.where} or {work.dense.where} gives NaN or infinite logits; check both models")
    return found


def _measured(work: HealingWork, objective: Objective, judging: States) -> HeadDivergence | None:
    """The model on the held-out sequences, in float32; None if it gives no finite numbers."""
    work.events.progress("judging", 0, 0, "held-out sequences")
    try:
        return objective.measure(judging, judging.sequences, torch.float32)
    except Diverged:
        return None


def _told(
    work: HealingWork,
    training: Training,
    batch: int,
    before: HeadDivergence,
    after: HeadDivergence,
    factors: Mapping[str, Tensor],
) -> Healed:
    state, changed = training.state, after is not before
    steps = int(state.checks[-1]["step"] or 0) if state.checks else 0
    matrices = healed_matrices(work.source, work.dense, {name: tensor.cpu() for name, tensor in factors.items()})
    return Healed(
        changed=changed,
        before=Judged.of(before),
        after=Judged.of(after),
        dense_loss=before.reference / before.tokens,
        held_out_tokens=before.tokens,
        tokens=steps * batch * work.tokens.ids.shape[1],
        steps=steps,
        best_step=state.best_step if changed else 0,
        lr=training.rate,
        batch_size=batch,
        anchor=work.request.healing.anchor,
        hints=work.request.healing.hints,
        precision=str(work.precision).removeprefix("torch."),
        processes=processes.current().size,
        trials=tuple(state.trials),
        checks=tuple(state.checks),
        trained=trained_numbers(work.source),
        matrices=matrices.products,
        rounded=matrices.rounded,
    )
