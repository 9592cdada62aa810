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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.factoring.operations import OPERATIONS
from svdconvert.factoring.refit_files import Refit, RefitFolder
from svdconvert.linalg.panels import Workspace
from svdconvert.models.activations import check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream, Weights
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.sentences import asked
from svdconvert.storage.source import Source

# One sequence of so many is held out.
HELD_OUT = 8

# Weights of the pull towards the truncation's own factor; infinity keeps that factor.
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# What is tried, one after the other, until it helps: whether targets make good what the layers before have lost.
ATTEMPTS = {"compensated": True, "plain": False}


@dataclass
class _Sums:
    """Sums over tokens for one layer: z = A x, target t."""

    gram: Tensor  # sum of z z^T, [rank, rank]
    cross: Tensor  # sum of t z^T, [out, rank]
    energy: float = 0.0  # sum of |t|^2

    def add(self, inner: Tensor, target: Tensor) -> None:
        self.gram.addmm_(inner.T, inner)
        self.cross.addmm_(target.T, inner)
        self.energy += float(target.square().sum())

    def error(self, up: Tensor) -> float:
        """Squared error of B, relative to the target's energy."""
        squared = self.energy - 2 * float((self.cross * up).sum()) + float(((up @ self.gram) * up).sum())
        return max(squared, 0.0) / self.energy if self.energy else 0.0


@dataclass
class _Layer:
    """A layer of the block in work."""

    target: Target
    up: Tensor  # the truncation's own as it is stored, of all outputs, float64
    down: Tensor  # likewise
    dtype: torch.dtype  # of what is stored
    tensors: list[Tensor]  # as stored
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return suffix(self.target.module)

    @property
    def weight(self) -> Tensor:
        return self.target.layout.product(self.tensors)


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
        place = RefitFolder(folder / name)
        found = place.outcome
        if found is None:
            run = _Run(source, targets, steps, tokens, place, work, device, batch_size, events, compensate)
            found = run.run()
            place.finish(found)
            shutil.rmtree(work, ignore_errors=True)
        if found.accepted or not compensate:
            return found, place
    raise AssertionError("the last attempt returns")


class _Run:
    def __init__(
        self,
        source: Source,
        targets: Sequence[Target],
        steps: Sequence[Step],
        tokens: CalibrationTokens,
        folder: RefitFolder,
        work: Path,
        device: str,
        batch_size: int,
        events: Events,
        compensate: bool,
    ) -> None:
        self.source, self.compensate = source, compensate
        self.steps, self.folder, self.events = {step.key: step for step in steps}, folder, events
        self.blocks = ModelBlocks(source, device=device)
        self.writers = self.blocks.writers if compensate else ()
        self.targets: dict[int, list[Target]] = {}
        for target in targets:
            if target.rank is not None:
                self.targets.setdefault(layer_number(target.module), []).append(target)
        self.workspace = Workspace()
        held = torch.zeros(len(tokens.ids), dtype=torch.bool)
        held[HELD_OUT - 1 :: HELD_OUT] = True
        held[-1] |= not bool(held.any())
        ranks = {target.module: target.rank for target in targets}
        key = {
            "model": source.identity(),
            "tokens": tokens.digest,
            "ranks": ranks,
            "compensate": compensate,
            "steps": [[step.key, step.kind, [info.dtype for info in step.outputs]] for step in steps],
        }

        def stream(name: str, folder_name: str, which: Tensor) -> Stream:
            return Stream(
                self.blocks,
                tokens.ids[which],
                tokens.mask[which],
                work / folder_name,
                key,
                name=name,
                batch_size=batch_size,
            )

        self.dense = {"train": stream("the model", "dense", ~held), "held": stream("the model", "dense-held", held)}
        name = "the compressed model"
        self.refitted = {"train": stream(name, "refitted", ~held), "held": stream(name, "refitted-held", held)}
        self.truncated = stream(name, "truncated-held", held)
        self.streams = [*self.dense.values(), *self.refitted.values(), self.truncated]
        check_room([one.store for one in self.streams], 2)
        self.tokens = int(tokens.mask[~held].sum())

    def run(self) -> Refit:
        start = max((i for i in range(self.blocks.count + 1) if all(s.has(i) for s in self.streams)), default=-1)
        if start < 0:
            with self.blocks.embeddings():
                for stream in self.streams:
                    stream.embed()
            start = 0
        for index in range(start, self.blocks.count):
            self.events.progress("refit", index, self.blocks.count)
            with self.blocks.block(index) as block:
                self.block(block, index)
            for stream in self.streams:
                stream.forget(index)
        self.events.progress("refit", self.blocks.count, self.blocks.count)
        with self.blocks.head() as head:
            losses = [stream.loss(head) for stream in (self.dense["held"], self.truncated, self.refitted["held"])]
        dense, truncated, refitted = (loss.nll / loss.tokens for loss in losses)
        return Refit(dense, truncated, refitted, self.tokens, self.compensate)

    def block(self, block: nn.Module, index: int) -> None:
        """Refit a block's layers, and take all hidden states through it."""
        layers = {suffix(target.module): self.truncation(block, target) for target in self.targets.get(index, [])}
        with self.blocks.replaced(block, {path: layer.weight for path, layer in layers.items()}):
            self.truncated.step(block, index)
        done: dict[str, Tensor] = {}
        for path in self.order(block, index):
            if path in layers:
                self.fit(block, index, layers[path], done)
                done[path] = layers[path].weight
        self.source.refuse_changed()
        for layer in layers.values():
            self.folder.save(layer.target.module, layer.tensors, layer.report)
        for part in ("train", "held"):
            self.dense[part].step(block, index)
            with self.blocks.replaced(block, done):
                self.refitted[part].step(block, index)

    def truncation(self, block: nn.Module, target: Target) -> _Layer:
        """The factors that would be written without a refit, to the bit: they are what it has to beat."""
        weight, step = self.blocks.matrix(block, suffix(target.module)), self.steps[target.weight]
        stored = weight.T if target.transposed else weight
        tensors, _ = OPERATIONS[step.kind]([stored], step, self.workspace)
        up, down = target.layout.factors(tensors)
        return _Layer(target, up.double(), down.double(), down.dtype, tensors)

    def order(self, block: nn.Module, index: int) -> list[str]:
        """Paths of the block's targets in the order in which they are called."""
        called: list[str] = []
        stream = self.dense["held"]
        with ExitStack() as hooks, torch.no_grad():
            for target in self.targets.get(index, []):
                path = suffix(target.module)
                layer, _ = self.blocks.place(path)
                _hook(hooks, block, layer, lambda layer, args, output, path=path: called.append(path))
            stream.run(block, index, stream.batches[0])
        return list(dict.fromkeys(called))

    def fit(self, block: nn.Module, index: int, layer: _Layer, done: Weights) -> None:
        """Find a layer's outer factor and put it into its stored tensors."""
        train, held = (self.sums(block, index, layer, done, part) for part in ("train", "held"))
        before = held.error(layer.up)
        best, damping, up = before, None, layer.up
        pull = torch.where(train.gram.diagonal() > 0, train.gram.diagonal(), 1)  # unused ranks stay zeros
        for candidate in DAMPINGS:
            root, failed = torch.linalg.cholesky_ex(train.gram + torch.diag(candidate * pull))
            if int(failed):
                continue
            found = torch.cholesky_solve((train.cross + candidate * pull * layer.up).T, root).T
            error = held.error(found)
            if error < best:
                best, damping, up = error, candidate, found
        if damping is not None:
            layer.tensors = layer.target.layout.refit(layer.tensors, up, train.gram, layer.dtype)
        layer.report = {"damping": damping, "held_out_error": [before**0.5, best**0.5]}

    def sums(self, block: nn.Module, index: int, layer: _Layer, done: Weights, part: str) -> _Sums:
        """What the regression of one layer needs, from one part of the sequences."""
        dense, refitted = self.dense[part], self.refitted[part]
        earlier = [path for path in done if path in self.writers] if layer.path in self.writers else []
        rank, out = layer.down.shape[0], layer.up.shape[0]
        name, section = self.blocks.place(layer.path)
        device, bias = layer.up.device, getattr(block.get_submodule(name), "bias", None)
        if section is not None and bias is not None:
            bias = section.of(bias)
        sums = _Sums(
            torch.zeros(rank, rank, dtype=torch.float64, device=device),
            torch.zeros(out, rank, dtype=torch.float64, device=device),
        )
        for batch in dense.batches:
            target = self.seen(block, index, dense, batch, layer.path, earlier)
            with self.blocks.replaced(block, done):
                mine = self.seen(block, index, refitted, batch, layer.path, earlier)
            wanted = target.outputs[layer.path] if bias is None else target.outputs[layer.path] - bias
            if layer.path in self.writers:
                lacking = dense.tokens(dense.read(index, batch), batch).double()
                lacking -= dense.tokens(refitted.read(index, batch), batch).double()
                for path in earlier:
                    lacking += target.outputs[path] - mine.outputs[path]
                wanted = wanted + lacking
            sums.add(mine.input @ layer.down.T, wanted)
        return sums

    def seen(
        self, block: nn.Module, index: int, stream: Stream, batch: slice, path: str, outputs: Sequence[str]
    ) -> _Seen:
        """What goes into a layer and comes out of it and others, in float64; the block is left after the layer."""
        seen = _Seen()

        def note(other: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            section = self.blocks.place(other)[1]
            own = output if section is None else section.of(output, output.dim() - 1)
            seen.outputs[other] = stream.tokens(own, batch).double()
            if other == path:
                seen.input = stream.tokens(args[0], batch).double()
                raise _Left

        with ExitStack() as hooks, torch.no_grad():
            for other in (*outputs, path):
                _hook(hooks, block, self.blocks.place(other)[0], partial(note, other))
            try:
                stream.run(block, index, batch)
            except _Left:
                return seen
        raise AssertionError(f"the block does not call {path}")


@dataclass
class _Seen:
    input: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: dict[str, Tensor] = field(default_factory=dict)


class _Left(Exception):
    """Leaves a block's forward pass once everything wanted was seen."""


def _hook(hooks: ExitStack, block: nn.Module, path: str, function: Any) -> None:
    handle = block.get_submodule(path).register_forward_hook(function)
    hooks.callback(handle.remove)
