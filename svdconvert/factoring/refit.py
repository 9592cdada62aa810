"""Sequential refit: outer factors fitted to the dense model on the inputs that the compressed layers before them give.

A truncation is the best one for the inputs of the dense model; but each layer of the result gets its inputs from
compressed layers. So the blocks are gone through in order, and the linear layers of each in the order in which they are
called. With x the input that a layer has in the model compressed so far, and A its input-side factor, the other factor
B solves the ridge regression

    minimise  sum over tokens of |t - B A x|^2  +  damping * sum_j E[(A x)_j^2] |B_j - B'_j|^2

towards the truncation's own B'. (SVD-LLM, arXiv:2403.07378, refits one factor on the inputs of the compressed model;
its target is the layer's output for that input. Here it is the dense model's own output, so that errors are made good
rather than handed on.) The target t is what the layer gives in the dense model; for a layer whose output is added to
the hidden state it is that plus what the hidden state lacks at this point, so that what the layers before have lost is
put back, as far as this layer can.

Every eighth sequence is held out. On those the damping is chosen, layer by layer, with the truncation's own B' among
the candidates; and at the end their loss decides between the refitted factors and the truncation's own. Far from the
dense model, what the hidden state lacks may be too much to put back; where the refit is not taken, it is made once more
with each layer's own output as its target.

Beside the dense model's hidden states, those of the model compressed so far are kept, and those of the unrefitted model
for the held-out sequences. One block is in memory at a time, with its targets twice, and per layer sums of size
rank x (rank + out) in float64.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.factoring.capture import Captured, call_order, capture, in_both
from svdconvert.factoring.operations import OPERATIONS
from svdconvert.factoring.refit_files import Refit, RefitFolder
from svdconvert.factoring.refit_streams import RefitStreams
from svdconvert.factoring.regression import Sums, fit
from svdconvert.linalg.panels import Workspace
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream, Weights
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.sentences import asked
from svdconvert.storage.source import Source

# What is tried, one after the other, until it helps: whether targets make good what the layers before have lost.
ATTEMPTS = {"compensated": True, "plain": False}


def refit_targets(
    source: Source,
    targets: Sequence[Target],
    steps: Sequence[Step],
    tokens: CalibrationTokens,
    folder: Path,
    *,
    work: Path,
    device: str,
    batch_size: int,
    events: Events,
) -> tuple[Refit, RefitFolder]:
    """Refit all factored targets, or what is left of it.

    Args:
        source: the dense model.
        targets: all targets, with their ranks.
        steps: what a conversion without a refit does.
        tokens: the calibration text.
        folder: where the factors go.
        work: folder for hidden states.
        device: where blocks are run.
        batch_size: sequences at a time.
        events: receiver of progress.

    Returns:
        How it ended, and the factors.

    Raises:
        InputError: there are too few sequences, or something is NaN or infinite.
        JobError: reading or writing failed; the same call goes on.
    """
    if len(tokens.ids) < 2:
        raise InputError(
            "a refit needs at least 2 calibration sequences, one of them held out; raise "
            f"{asked('calibration.samples')}"
        )
    for name, compensate in ATTEMPTS.items():
        results = RefitFolder(folder / name)
        outcome = results.outcome
        if outcome is None:
            blocks = ModelBlocks(source, device=device)
            key = _key(source, targets, steps, tokens, compensate=compensate)
            streams = RefitStreams(blocks, tokens, work, key, batch_size)
            outcome = _Attempt(source, blocks, streams, targets, steps, results, events, compensate).run()
            results.finish(outcome)
            shutil.rmtree(work, ignore_errors=True)
        if outcome.accepted or not compensate:
            return outcome, results
    raise AssertionError("the last attempt returns")


def _key(
    source: Source, targets: Sequence[Target], steps: Sequence[Step], tokens: CalibrationTokens, *, compensate: bool
) -> dict[str, Any]:
    """What the hidden states of an attempt depend on, in JSON types."""
    return {
        "model": source.identity(),
        "tokens": tokens.digest,
        "ranks": {target.module: target.rank for target in targets},
        "compensate": compensate,
        "steps": [[step.key, step.kind, [info.dtype for info in step.outputs]] for step in steps],
    }


@dataclass
class _Layer:
    """A layer of the block in work.

    Attributes:
        target: what it is.
        up, down: the truncation's own factors as they are stored, [out, rank] and [rank, in] float64.
        dtype: of what is stored.
        tensors: of its layout, as they are stored.
        report: how its regression ended.
    """

    target: Target
    up: Tensor
    down: Tensor
    dtype: torch.dtype
    tensors: list[Tensor]
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Its name within the block."""
        return suffix(self.target.module)

    @property
    def weight(self) -> Tensor:
        """The matrix that it stands for, float64."""
        return self.target.layout.product(self.tensors)


class _Attempt:
    """A refit with one kind of targets."""

    def __init__(
        self,
        source: Source,
        blocks: ModelBlocks,
        streams: RefitStreams,
        targets: Sequence[Target],
        steps: Sequence[Step],
        results: RefitFolder,
        events: Events,
        compensate: bool,
    ) -> None:
        self._source, self._blocks, self._streams = source, blocks, streams
        self._results, self._events, self._compensate = results, events, compensate
        self._steps: Mapping[str, Step] = {step.key: step for step in steps}
        self._targets: dict[int, list[Target]] = {}
        for target in targets:
            if target.rank is not None:
                self._targets.setdefault(layer_number(target.module), []).append(target)
        # Layers whose output is added to the hidden state, where what that lacks is to be put back.
        self._writers = blocks.writers if compensate else ()
        self._workspace = Workspace()

    def run(self) -> Refit:
        """Refit block after block, from the first that is not done."""
        count = self._blocks.count
        for index in range(self._streams.begin(), count):
            self._events.progress("refit", index, count)
            with self._blocks.block(index) as block:
                self.refit_block(block, index)
            self._streams.forget(index)
        self._events.progress("refit", count, count)
        dense, truncated, refitted = self._streams.losses()
        return Refit(dense, truncated, refitted, self._streams.tokens, self._compensate)

    def refit_block(self, block: nn.Module, index: int) -> None:
        """Refit a block's layers, and take all hidden states through it."""
        streams = self._streams
        truncations = [self._truncation(block, target) for target in self._targets.get(index, [])]
        layers = {layer.path: layer for layer in truncations}
        with self._blocks.replaced(block, {path: layer.weight for path, layer in layers.items()}):
            streams.truncated.step(block, index)
        done: dict[str, Tensor] = {}
        for path in call_order(self._blocks, block, index, streams.dense.held_out, list(layers)):
            self._refit_layer(block, index, layers[path], done)
            done[path] = layers[path].weight
        self._source.refuse_changed()
        for layer in layers.values():
            self._results.save(layer.target.module, layer.tensors, layer.report)
        for dense, refitted in zip(streams.dense, streams.refitted, strict=True):
            dense.step(block, index)
            with self._blocks.replaced(block, done):
                refitted.step(block, index)

    def _truncation(self, block: nn.Module, target: Target) -> _Layer:
        """The factors that would be written without a refit, to the bit: they are what it has to beat."""
        weight, step = self._blocks.matrix(block, suffix(target.module)), self._steps[target.weight]
        stored = weight.T if target.transposed else weight
        tensors, _ = OPERATIONS[step.kind]([stored], step, self._workspace)
        up, down = target.layout.factors(tensors)
        return _Layer(target, up.double(), down.double(), down.dtype, tensors)

    def _refit_layer(self, block: nn.Module, index: int, layer: _Layer, done: Weights) -> None:
        """Find a layer's outer factor and put it into its stored tensors."""
        dense, refitted = self._streams.dense, self._streams.refitted
        train = self._sums(block, index, layer, done, dense.train, refitted.train)
        held_out = self._sums(block, index, layer, done, dense.held_out, refitted.held_out)
        result = fit(train, held_out, layer.up)
        if result.damping is not None:
            layer.tensors = layer.target.layout.refit(layer.tensors, result.up, train.gram, layer.dtype)
        layer.report = result.to_json()

    def _sums(
        self, block: nn.Module, index: int, layer: _Layer, done: Weights, dense: Stream, refitted: Stream
    ) -> Sums:
        """What the regression of one layer needs, from the same sequences in both models.

        Args:
            block: the block, with the dense model's weights.
            index: its number.
            layer: the layer.
            done: the block's layers that are refitted already.
            dense, refitted: what goes into the block.
        """
        is_writer = layer.path in self._writers
        earlier = [path for path in done if path in self._writers] if is_writer else []
        bias = self._bias(block, layer.path)
        sums = Sums.zeros(layer.down.shape[0], layer.up.shape[0], layer.up.device)
        for batch in dense.batches:
            wanted = capture(self._blocks, block, index, dense, batch, layer.path, earlier)
            with self._blocks.replaced(block, done):
                given = capture(self._blocks, block, index, refitted, batch, layer.path, earlier)
            target, inputs = in_both(wanted, given, layer.path)
            if bias is not None:
                target = target - bias
            if is_writer:
                lacking = dense.tokens(dense.read(index, batch), batch).double()
                lacking -= dense.tokens(refitted.read(index, batch), batch).double()
                target = target + _with_earlier(lacking, wanted, given, earlier)
            sums.add(inputs @ layer.down.T, target)
        return sums

    def _bias(self, block: nn.Module, path: str) -> Tensor | None:
        """Bias of a layer, or of its part of a fused projection."""
        name, section = self._blocks.place(path)
        bias: Tensor | None = getattr(block.get_submodule(name), "bias", None)
        return bias if bias is None or section is None else section.of(bias)


def _with_earlier(lacking: Tensor, wanted: Captured, given: Captured, earlier: Sequence[str]) -> Tensor:
    """What the hidden state lacks behind earlier layers that add to it, from what it lacks before the block."""
    for path in earlier:
        lacking += wanted.outputs[path] - given.outputs[path]
    return lacking
