"""A model on some sequences of its calibration text, dense and compressed, and what was measured there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.factoring.truncations import Truncations
from svdconvert.fields import Kind, require
from svdconvert.linalg.feedback import PROCEDURE, SWEEPS
from svdconvert.models.activations import check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream, Weights
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
class Bench:
    """Where and on what models are measured.

    Attributes:
        source: the dense model.
        tokens: the calibration text.
        key: what the decompositions depend on, in JSON types.
        folder: keeps the results.
        states: keeps hidden states; whoever removes it loses time only.
        device: where blocks are run.
        batch_size: sequences at a time.
        events: receiver of progress.
    """

    source: Source
    tokens: CalibrationTokens
    key: Mapping[str, Any]
    folder: Path
    states: Path
    device: str
    batch_size: int
    events: Events

    @cached_property
    def blocks(self) -> ModelBlocks:
        """The dense model; built when it is first needed."""
        return ModelBlocks(self.source, device=self.device)

    def kept(self, key: Mapping[str, Any], fields: Mapping[str, Kind], measure: Callable[[], Mapping[str, Any]]) -> Any:
        """A result, from an earlier run or measured now.

        Args:
            key: all that it depends on, in JSON types.
            fields: that it must have.
            measure: gives it.

        Raises:
            InputError: the file of an earlier run is damaged.
            JobError: it cannot be written.
        """
        whole = json.dumps([key, versions()["svdconvert"], torch.__version__], sort_keys=True)
        path = self.folder / f"{hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()}.json"
        if not path.is_file():
            result = measure()
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                atomic_write(path, sealed(result))
        document = unseal(read_json(path, "", _AGAIN), path, _AGAIN)
        require(document, fields, path, _AGAIN)
        return document

    def tidy(self) -> None:
        """Remove the hidden states; the results stay."""
        shutil.rmtree(self.states, ignore_errors=True)


class Sampled:
    """Some sequences on a bench."""

    def __init__(self, bench: Bench, sample: Tensor, batch_size: int, name: str, length: int | None = None) -> None:
        """Prepare.

        Args:
            bench: where they are run.
            sample: their numbers, int64.
            batch_size: sequences at a time.
            name: of the folder of their hidden states.
            length: tokens of a sequence that are read, from its beginning; None for all.
        """
        self.bench, self._name, self._batch_size = bench, name, batch_size
        self.ids, self.mask = bench.tokens.ids[sample, :length], bench.tokens.mask[sample, :length]
        self._key = {
            **bench.key,
            "text": bench.tokens.digest,
            "sample": sample.tolist(),
            "length": self.ids.shape[1],
            "batch_size": batch_size,
        }

    def key(self, steps: Sequence[Step]) -> dict[str, Any]:
        """All that what is measured of a plan's factors depends on, in JSON types."""
        return {**self._key, "factors": [_factors_key(step) for step in steps if step.kind != "copy"]}

    @cached_property
    def dense(self) -> Stream:
        """The dense model's last hidden states; the way to them is forgotten."""
        dense = self._stream("dense", self._key, "the model")
        check_room({dense.store: 2})
        self._pass(dense, lambda index: {}, "the dense model", keep=False)
        return dense

    def compressed(self, targets: Sequence[Target], steps: Sequence[Step], name: str, *, keep: bool) -> Stream:
        """The hidden states of a compressed model.

        Args:
            targets: all targets, with their ranks.
            steps: of the plan with these ranks.
            name: for the progress.
            keep: whether the inputs of all blocks stay, or the last hidden states alone.

        Raises:
            InputError: something is NaN or infinite, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        blocks = self.bench.blocks
        stream = self._stream("compressed", {**self.key(steps), "keep": keep}, "the compressed model")
        check_room({stream.store: blocks.count + 3 if keep else 2})
        self._pass(stream, Truncations(self.bench.source, targets, steps, blocks.device), name, keep=keep)
        return stream

    def _pass(self, stream: Stream, matrices: Callable[[int], Weights], name: str, *, keep: bool) -> None:
        """From the embeddings, or from where an earlier run was broken off, to the last hidden states."""
        blocks = self.bench.blocks
        for index in range(stream.begin(), blocks.count):
            self.bench.events.progress("measuring", index, blocks.count, name)
            with blocks.block(index) as block, blocks.replaced(block, matrices(index)):
                stream.step(block, index)
            if not keep:
                stream.forget(index)
        self.bench.events.progress("measuring", blocks.count, blocks.count, name)

    def _stream(self, folder: str, key: Mapping[str, Any], name: str) -> Stream:
        place = self.bench.states / f"{self._name}-{folder}"
        return Stream(self.bench.blocks, self.ids, self.mask, place, key, name=name, batch_size=self._batch_size)


def _factors_key(step: Step) -> list[Any]:
    """What the factors of a step depend on beside the decompositions."""
    names, types = [info.name for info in step.inputs], [info.dtype for info in step.outputs]
    grids = [step.options["grids"], PROCEDURE, SWEEPS] if "grids" in step.options else []
    return [step.kind, names, step.options["rank"], step.options["layout"], types, *grids]
