"""Measuring what ranks would cost, from decompositions and without writing a model.

The dense model's last hidden states are computed once; for every choice of ranks the sequences go through the
compressed blocks, one block in memory at a time, and the head compares both. Every finished trial is kept in a small
file, so that an interrupted search, or another one over the same decompositions, does not repeat it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.factoring.samples import held_out_sample
from svdconvert.factoring.truncations import Truncations
from svdconvert.fields import COUNT, NUMBER, require
from svdconvert.models.activations import check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import read_json
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_files import sealed, unseal
from svdconvert.version import versions

# What to do about a damaged file.
_AGAIN = "delete it, then the same command measures again"


@dataclass(frozen=True)
class Trial:
    """What some ranks cost on held-out sequences, in nats per predicted token.

    Attributes:
        kl: mean KL(dense || compressed).
        added: loss beyond the dense model's.
        dense: the dense model's loss.
        tokens: number of predicted tokens.
    """

    kl: float
    added: float
    dense: float
    tokens: int


_TRIAL = {"kl": NUMBER, "added": NUMBER, "dense": NUMBER, "tokens": COUNT}


class Trials:
    """Trials of one model, text and set of decompositions."""

    def __init__(
        self,
        source: Source,
        tokens: CalibrationTokens,
        key: Mapping[str, Any],
        *,
        folder: Path,
        states: Path,
        device: str,
        batch_size: int,
        events: Events,
    ) -> None:
        """Prepare; nothing is computed before a trial needs it.

        Args:
            source: the dense model.
            tokens: the calibration text.
            key: what the decompositions depend on, in JSON types.
            folder: keeps the results.
            states: keeps hidden states; whoever removes it loses time only.
            device: where blocks are run.
            batch_size: sequences at a time.
            events: receiver of progress.

        Raises:
            InputError: there are too few sequences.
        """
        self._source, self._folder, self._states = source, folder, states
        self._device, self._batch_size, self._events = device, batch_size, events
        sample = held_out_sample(tokens)
        self._ids, self._mask = tokens.ids[sample], tokens.mask[sample]
        self._key = {**key, "text": tokens.digest, "sequences": sample.tolist(), "batch_size": batch_size}

    def measure(self, targets: Sequence[Target], steps: Sequence[Step], name: str) -> Trial:
        """What ranks cost.

        Args:
            targets: all targets, with their ranks.
            steps: of the plan with these ranks.
            name: of the trial, for the progress.

        Raises:
            InputError: something is NaN or infinite, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        key = {**self._key, "steps": steps_key(steps)}
        path = self._folder / f"{digest(key)}.json"
        if path.is_file():
            document = unseal(read_json(path, "", _AGAIN), path, _AGAIN)
            require(document, _TRIAL, path, _AGAIN)
            return Trial(**{field: document[field] for field in _TRIAL})
        trial = self._measured(targets, steps, key, name)
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, sealed(asdict(trial)))
        return trial

    def tidy(self) -> None:
        """Remove the hidden states; the results stay."""
        shutil.rmtree(self._states, ignore_errors=True)

    def _measured(self, targets: Sequence[Target], steps: Sequence[Step], key: Mapping[str, Any], name: str) -> Trial:
        dense, blocks = self._dense, self._blocks
        other = self._stream("compressed", key, "the compressed model")
        check_room([other.store], 2)
        matrices = Truncations(self._source, targets, steps, blocks.device)
        for index in range(other.begin(), blocks.count):
            self._events.progress("measuring", index, blocks.count, name)
            with blocks.block(index) as block, blocks.replaced(block, matrices(index)):
                other.step(block, index)
            other.forget(index)
        self._events.progress("measuring", blocks.count, blocks.count, name)
        with blocks.head() as head:
            sums = other.divergence(head, dense)
        other.store.clear()
        count = sums.tokens
        return Trial(sums.kl / count, (sums.other - sums.reference) / count, sums.reference / count, count)

    @cached_property
    def _blocks(self) -> ModelBlocks:
        return ModelBlocks(self._source, device=self._device)

    @cached_property
    def _dense(self) -> Stream:
        """The dense model's last hidden states."""
        blocks, dense = self._blocks, self._stream("dense", self._key, "the model")
        check_room([dense.store], 2)
        for index in range(dense.begin(), blocks.count):
            self._events.progress("measuring", index, blocks.count, "the dense model")
            with blocks.block(index) as block:
                dense.step(block, index)
            dense.forget(index)
        return dense

    def _stream(self, folder: str, key: Mapping[str, Any], name: str) -> Stream:
        place = self._states / folder
        return Stream(self._blocks, self._ids, self._mask, place, key, name=name, batch_size=self._batch_size)


def steps_key(steps: Sequence[Step]) -> list[Any]:
    """What the factors of a plan depend on beside the decompositions, in JSON types."""
    return [
        [
            step.kind,
            [info.name for info in step.inputs],
            step.options["rank"],
            step.options["layout"],
            [info.dtype for info in step.outputs],
        ]
        for step in steps
        if step.kind != "copy"
    ]


def digest(key: Mapping[str, Any]) -> str:
    """A name for what a key stands for."""
    whole = json.dumps([key, versions()["svdconvert"], torch.__version__], sort_keys=True)
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
