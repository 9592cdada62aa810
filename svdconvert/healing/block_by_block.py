"""Healing block by block: each block's factors alone are trained, to the outputs of the dense model's block.

One block is in memory at a time. Its inputs are what the compressed blocks before it give, as they are by then, so that
it makes up for their errors too; its targets are the dense model's outputs on the same text. That is far from what
counts, the predictions: it wins less than training the whole model, and serves where that does not fit into memory.
Whether it is worth anything is judged by the predictions on the held-out sequences in the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.errors import InputError
from svdconvert.families.table import factored_architecture
from svdconvert.healing.block_objective import BlockObjective, BlockStates, trained_block
from svdconvert.healing.matrices import healed_matrices
from svdconvert.healing.memory import check_memory
from svdconvert.healing.objective import Diverged, require_finite
from svdconvert.healing.outcome import Healed, Judged
from svdconvert.healing.sequences import Order, judges
from svdconvert.healing.state import StateFile
from svdconvert.healing.trained import Trained, trained_numbers, trained_tensors
from svdconvert.healing.training import Texts, Training
from svdconvert.healing.work import BLOCKS, STATE, STATES, HealingWork
from svdconvert.layouts.table import shared_layers
from svdconvert.machine import processes
from svdconvert.models.activations import check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.head_divergence import HeadDivergence, head_divergence
from svdconvert.models.loss import head_batches
from svdconvert.models.stream import Stream
from svdconvert.names import layer_number
from svdconvert.planning.events import Events
from svdconvert.planning.healing_needs import training_bytes
from svdconvert.sentences import asked
from svdconvert.storage.disk import disk_errors
from svdconvert.storage.tensor_files import read_note, read_tensors, write_tensors


def heal_blocks(work: HealingWork) -> tuple[Healed, Mapping[str, Tensor]]:
    """Train the blocks one after the other, or those that are left.

    Returns:
        How it ended, and the factors as they are to be stored.

    Raises:
        InputError: a model or the text cannot be used.
        JobError: the disk fails; the same call goes on.
    """
    refuse(work)
    run = _Run(work)
    blocks = [run.block(index) for index in range(run.first, run.ours.count)]
    told = [*run.earlier(), *blocks]
    before, after = run.divergence(run.start_held), run.divergence(run.ours_held)
    if before is None:
        raise InputError(f"{work.source.where} or {work.dense.where} gives NaN or infinite logits; check both models")
    changed = after is not None and after.kl < before.kl
    factors = run.healed() if changed else run.start()
    steps, matrices = sum(int(one["steps"]) for one in told), healed_matrices(work.source, work.dense, factors)
    healed = Healed(
        changed=changed,
        before=Judged.of(before),
        after=Judged.of(after if changed and after is not None else before),
        dense_loss=before.reference / before.tokens,
        held_out_tokens=before.tokens,
        tokens=steps * work.batch * work.tokens.ids.shape[1],
        steps=steps,
        best_step=0,
        lr=None,
        batch_size=work.batch,
        anchor=work.request.healing.anchor,
        precision=str(work.precision).removeprefix("torch."),
        blocks=tuple(told),
        trained=trained_numbers(work.source),
        matrices=matrices.products,
        rounded=matrices.rounded,
    )
    return healed, factors


def refuse(work: HealingWork) -> None:
    """Refuse what cannot be trained block by block.

    Raises:
        InputError: layers of several blocks share a factor, several processes are at it, or the memory is too small.
    """
    source = work.source
    if any(layer_number(user) != layer_number(owner) for user, owner in shared_layers(source.config).items()):
        raise InputError(
            f"{asked('how', 'blocks')} does not go with {source.where}, in which layers of several blocks share a "
            f"factor; use {asked('how', 'end-to-end')}"
        )
    if processes.current().size > 1:
        raise InputError(f"{asked('how', 'blocks')} runs in one process; start it without torchrun")
    factors = trained_tensors(source)
    largest = 0
    for index in {layer_number(info.name) for info in factors}:
        block = [info for info in source.tensors.values() if layer_number(info.name) == index]
        trained = [info for info in factors if layer_number(info.name) == index]
        largest = max(largest, training_bytes(block, trained, source.packed))
    check_memory(largest + sum(info.nbytes for info in factors), source.where, work.device)


@dataclass(frozen=True)
class _OfBlock(Events):
    """Progress of a block as that of all."""

    events: Events
    index: int
    count: int

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        place = f"block {self.index + 1} of {self.count}, {detail}"
        self.events.progress(phase, self.index * total + done, self.count * total, place)


class _Run:
    """The models and the streams of hidden states.

    Attributes:
        ours: the compressed model.
        first: the block to go on with.
        start_held, ours_held: the held-out sequences in the compressed model, as it was and as it is healed.
    """

    def __init__(self, work: HealingWork) -> None:
        self._work, tokens = work, work.tokens
        self._held = judges(tokens)
        others = torch.ones(len(tokens.ids), dtype=torch.bool)
        others[self._held] = False
        self._train = others.nonzero()[:, 0]
        self._dense, self.ours = (ModelBlocks(one, device=work.device) for one in (work.dense, work.source))
        key = {**work.key, "start": work.source.identity()}
        self._key = json.loads(json.dumps(key))

        def stream(blocks: ModelBlocks, sequences: Tensor, name: str) -> Stream:
            return Stream(
                *(blocks, tokens.ids[sequences], tokens.mask[sequences], work.folder / STATES / name, key),
                name="the dense model" if blocks is self._dense else "the compressed model",
                batch_size=work.request.calibration.batch_size,
            )

        self._dense_train = stream(self._dense, self._train, "dense-training")
        self._dense_held = stream(self._dense, self._held, "dense-held-out")
        self._ours_train = stream(self.ours, self._train, "training")
        self.ours_held = stream(self.ours, self._held, "held-out")
        self.start_held = stream(self.ours, self._held, "start-held-out")
        self._streams = (self._dense_train, self._dense_held, self._ours_train, self.ours_held, self.start_held)
        check_room({one.store: 2 for one in self._streams})
        self.first = min(one.begin() for one in self._streams)

    def block(self, index: int) -> Mapping[str, Any]:
        """Heal a block, and go on to the next one's inputs; gives what is to be told of it."""
        work, ours = self._work, self.ours
        work.events.progress("dense model", index, ours.count, "all sequences")
        with self._dense.block(index) as block:
            self._step(block, index, self._dense_train, self._dense_held)
        with trained_block(ours, index, work.source, self._place(index)) as (block, student):
            self._step(block, index, self.start_held)
            if not self._file(index).is_file():
                told, factors = self._trained(block, student, index)
                with disk_errors(work.folder):
                    self._file(index).parent.mkdir(parents=True, exist_ok=True)
                write_tensors(self._file(index), factors, json.dumps(told))
            if student.factors:
                student.put(read_tensors(self._file(index)))
            self._step(block, index, self._ours_train, self.ours_held)
        for one in self._streams:
            one.forget(index)
        return self._told(index)

    def earlier(self) -> list[Mapping[str, Any]]:
        """What is to be told of the blocks that were done before."""
        return [self._told(index) for index in range(self.first)]

    def healed(self) -> dict[str, Tensor]:
        """The factors of all blocks as they are to be stored."""
        return {n: t for index in range(self.ours.count) for n, t in read_tensors(self._file(index)).items()}

    def start(self) -> dict[str, Tensor]:
        """The factors as they were."""
        found: dict[str, Tensor] = {}
        for index in range(self.ours.count):
            with trained_block(self.ours, index, self._work.source, self._place(index)) as (_, student):
                found |= {name: tensor.cpu() for name, tensor in student.start.items()}
        return found

    def divergence(self, stream: Stream) -> HeadDivergence | None:
        """How far the predictions are from the dense model's; None if there are no finite ones."""
        self._work.events.progress("judging", 0, 0, "held-out sequences")
        sums, count, tokens = HeadDivergence(), self.ours.count, self._work.tokens
        ids, mask = tokens.ids[self._held], tokens.mask[self._held]
        try:
            with self.ours.head() as head, self._dense.head() as reference_head:
                for batch in head_batches(stream.batches, ids.shape[1], head):
                    found, _ = head_divergence(
                        *(head, self._dense_held.read(count, batch), stream.read(count, batch)),
                        *(ids[batch], mask[batch]),
                        check=require_finite,
                        reference_head=reference_head,
                    )
                    sums += found
        except Diverged:
            return None
        return sums

    def _step(self, block: nn.Module, index: int, *streams: Stream) -> None:
        """From the inputs of a block to those of the next one, where they are not there."""
        for one in streams:
            if not one.has(index + 1):
                one.step(block, index)

    def _trained(self, block: nn.Module, student: Trained, index: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is to be told of a block's training, and its best factors."""
        work = self._work
        if not student.factors:
            return {"steps": 0, "lr": None, "before": 0.0, "after": 0.0}, {}
        mask, healing = work.tokens.mask, work.request.healing
        train, held = (
            BlockStates(numbers, mask, inputs, targets, index)
            for numbers, inputs, targets in (
                (self._train, self._ours_train, self._dense_train),
                (self._held, self.ours_held, self._dense_held),
            )
        )
        at_a_time = work.request.calibration.batch_size
        objective = BlockObjective(self.ours, block, student, mask, at_a_time, work.precision)
        training = Training(
            objective,
            Texts(train, held, Order(self._train, work.batch, work.request.calibration.seed)),
            healing.lr,
            healing.total_steps(len(self._train), work.batch),
            healing.anchor,
            StateFile(work.folder / STATE, {**self._key, "block": index}),
            _OfBlock(work.events, index, self.ours.count),
        )
        try:
            training.run()
        except Diverged:  # only the start gets here
            raise InputError(
                f"block {index} of {work.source.where} gives NaN or infinite numbers in {work.precision}; use "
                f"{asked('precision', 'float32')}"
            ) from None

        def error(factors: Mapping[str, Tensor]) -> float:
            """On the held-out sequences, in float32; infinite if it is no number."""
            try:
                with student.having(factors):
                    sums = objective.measure(held, held.sequences, torch.float32)
            except Diverged:
                return math.inf
            return sums.kl / sums.tokens

        before = error(student.start)
        if math.isinf(before):
            raise InputError(f"block {index} of {work.source.where} gives NaN or infinite numbers; check the model")
        after = before if training.best is None else error(training.best)
        better = after < before
        steps = int(training.state.checks[-1]["step"] or 0) if training.state.checks else 0
        told = {"steps": steps, "lr": training.rate, "before": before, "after": min(before, after)}
        best = training.best if better and training.best is not None else student.start
        return told, {name: tensor.cpu() for name, tensor in best.items()}

    def _place(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        source = self._work.source
        row = factored_architecture(source.config, source.where)
        return f"{row.prefix}{row.pieces.blocks}.{index}."

    def _file(self, index: int) -> Path:
        return self._work.folder / BLOCKS / f"{index}.safetensors"

    def _told(self, index: int) -> Mapping[str, Any]:
        told: dict[str, Any] = json.loads(read_note(self._file(index)))
        return told
