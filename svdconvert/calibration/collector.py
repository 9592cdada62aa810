"""Statistics of a model's linear layers on calibration text, collected block by block.

For a linear layer y = W x + b, W [out, in], over all tokens that are not padding:

* input Gram C = E[x x^T] [in, in] (SVD-LLM, arXiv:2403.07378; the A of K-FAC, arXiv:1503.05671),
* output Gram G = E[g g^T] [out, out] (the G of K-FAC); g is the gradient with respect to y of the summed next-token
  cross-entropy of the sequence, in nats,
* mean absolute input E|x| [in] (ASVD, arXiv:2312.05821),
* Fisher vector [in] (FWSVD, arXiv:2207.00112): the mean over sequences of (dL/dW_ij)^2, L the same sum over one
  sequence, summed over the outputs i. The gradient of a batch would be squared after its samples had cancelled.

Where gradients are needed, each block's input is kept on disk during one pass forward; then the head gives the
gradient at the last block's output, and the blocks are run once more, backward, each with the gradient that the one
above it left. Otherwise one pass forward is enough.

Memory, with B sequences of T tokens in a batch, N in all, hidden size h and inner size f. On the device: the weights of
one block, or of the embeddings, or of the head, in the type that is computed in; the Grams of one block in float64, in
a GPT-NeoX block 8 (3 h^2 + f^2) bytes for C and 8 (11 h^2 + f^2) for G; :data:`ROWS` rows of a layer's input in
float64; what one block's forward and backward passes hold for B T tokens; for the Fisher vector one matrix and its
square; and the logits of :mod:`svdconvert.models.loss`, a few times over. On the host: a batch of activations, and of
several processes with devices of their own the same Grams once more. On disk: N T h numbers for each block where
gradients are needed, for two blocks where they are not.

Several processes (``machine/processes.py``) take a part of the sequences each, and a block's sums are added up over
them, in float64 and with the same bits for all. They differ from a single process's by the order of the additions
alone, a few units of 1e-16 of the largest entries; what is between blocks is each process's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.families.row import Section
from svdconvert.machine.processes import Group, current
from svdconvert.methods.statistics import STATISTICS, ModuleStatistics, Needs
from svdconvert.models.activations import ActivationStore, Loss, check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.loss import next_token_loss
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.sentences import asked
from svdconvert.storage.source import Source
from svdconvert.version import __version__

LABELS = ("empirical", "sampled")

# Upper triangles of Grams are added up in panels of so many columns, from so many rows at a time.
PANEL, ROWS = 256, 1024

_Blocks = Generator[tuple[int, dict[str, "ModuleStatistics"]], None, None]


def statistics(
    source: Source,
    tokens: CalibrationTokens,
    needs: Needs,
    modules: Sequence[str],
    *,
    work: Path,
    device: str = "cpu",
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    labels: str = "empirical",
    seed: int = 0,
    skip_blocks: Collection[int] = (),
    events: Events | None = None,
) -> StatisticsRun:
    """Collect statistics, block by block.

    What is between blocks lies in ``work``, so a run that was broken off goes on from its last finished block with the
    same bits; files of another model, text or setting there are given up. They are removed when the run is through.

    Args:
        source: the dense model. Its files are read twice where gradients are needed, and not released.
        tokens: what to calibrate with.
        needs: what to collect.
        modules: linear layers, as ``layers.3.attention.dense``, or parts of fused ones (``families/fused.py``), whose
            outputs are then their own.
        work: folder for activations and gradients.
        device: where blocks are run.
        batch_size: sequences at a time; changes results by rounding only.
        dtype: what blocks compute in, float32 by default: gradients of single tokens are below float16's range.
        labels: ``empirical`` takes the text's own next tokens; ``sampled`` draws them from the model's distribution
            (the true Fisher instead of the empirical one), each position by itself.
        seed: of the drawing.
        skip_blocks: blocks whose statistics are not needed any more.
        events: told the loss and the progress.

    Returns:
        An iterator over ``(block, {module: ModuleStatistics})``: from the first block to the last, or, where gradients
        are needed, from the last to the first. A block's files are given up when the next one is asked for; its
        statistics should be let go of by then, being most of what is in memory.

    Raises:
        InputError: a module does not exist, the tokens are not the model's, something is NaN or infinite, or the disk
            is too small.
        JobError: reading or writing failed; the same call goes on.
    """
    return StatisticsRun(
        source,
        tokens,
        needs,
        modules,
        work=work,
        device=device,
        batch_size=batch_size,
        dtype=dtype or torch.float32,
        labels=labels,
        seed=seed,
        skip_blocks=skip_blocks,
        events=events or Events(),
    )


class StatisticsRun(Iterator[tuple[int, dict[str, ModuleStatistics]]]):
    """What :func:`statistics` returns.

    Attributes:
        loss: the model's loss; known with the first block where gradients are needed, otherwise at the end. None where
            there was nothing left to do.
    """

    def __init__(
        self,
        source: Source,
        tokens: CalibrationTokens,
        needs: Needs,
        modules: Sequence[str],
        *,
        work: Path,
        device: str,
        batch_size: int,
        dtype: torch.dtype,
        labels: str,
        seed: int,
        skip_blocks: Collection[int],
        events: Events,
    ) -> None:
        """Check everything that can be checked without weights. Arguments as of :func:`statistics`."""
        if labels not in LABELS:
            raise InputError(f"labels {labels!r} are unknown; choose {' or '.join(LABELS)}")
        if batch_size < 1:
            raise InputError(f"a batch of {batch_size} sequences is not possible; use at least 1")
        self._blocks = ModelBlocks(source, device=device, dtype=dtype)
        self._source = source
        self._name, self._tokens, self._needs, self._labels, self._seed = source.name, tokens, needs, labels, seed
        self._events, self._group = events, current()
        self._check_tokens()
        self._draw_shape, self._part = tokens.ids.shape, self._group.portion(tokens.ids.shape[0])
        self._tokens = replace(tokens, ids=tokens.ids[self._part], mask=tokens.mask[self._part])
        count = self._tokens.ids.shape[0]
        self._batches = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        self._modules = _by_block(self._blocks, modules)
        self._todo = sorted(set(self._modules) - set(skip_blocks)) if needs != Needs() else []
        key = {
            "model": source.identity(),
            "config": dict(source.config),
            "tokens": tokens.digest,
            "part": [self._part.start, self._part.stop],
            "batch_size": batch_size,
            "dtype": str(dtype),
            "device": torch.device(device).type,
            "labels": labels,
            "seed": seed,
            "code": [__version__, torch.__version__],
        }
        shape = (*self._tokens.ids.shape, self._blocks.hidden_size)
        self._store = ActivationStore(self._group.own(work / "activations"), key, shape, dtype)
        copies = self._blocks.count + 2 if needs.gradients else 2
        check_room([self._store], copies)
        self.loss: Loss | None = self._store.loss if self._group.all(self._store.loss is not None) else None
        self._generator = self._backward() if needs.gradients else self._forward()

    def __next__(self) -> tuple[int, dict[str, ModuleStatistics]]:
        return next(self._generator)

    def refuse_changed(self) -> None:
        """As :meth:`svdconvert.storage.source.Source.refuse_changed`."""
        self._source.refuse_changed()

    def close(self) -> None:
        """Stop; what is finished stays for the next run."""
        self._generator.close()

    def _check_tokens(self) -> None:
        blocks, ids = self._blocks, self._tokens.ids
        if ids.shape[0] < self._group.size:
            raise InputError(
                f"{ids.shape[0]} calibration sequences are too few for {self._group.size} processes; "
                f"raise {asked('calibration.samples')} or start fewer"
            )
        if ids.numel() == 0 or not bool(self._tokens.mask[:, 1:].any()):
            raise InputError("the calibration text has no token to predict; give more text")
        if int(ids.max()) >= blocks.vocabulary or int(ids.min()) < 0:
            raise InputError(
                f"the calibration text has the token {int(ids.max())}, but {self._name} knows {blocks.vocabulary:,}; "
                "the tokenizer belongs to another model"
            )
        if blocks.longest is not None and ids.shape[1] > blocks.longest:
            raise InputError(
                f"calibration sequences of {ids.shape[1]:,} tokens are too long; {self._name} reads up to "
                f"{blocks.longest:,}"
            )

    def _forward(self) -> _Blocks:
        """One pass; statistics of inputs alone."""
        count = self._blocks.count
        present = [i for i in range(count + 1) if self._has(f"hidden-{i}")]
        if self._todo:
            present = [i for i in present if i <= self._todo[0]]
        elif self.loss is not None or not present:
            return
        start = max(present, default=0)
        if not present:
            self._embed()
        for index in range(start, count):
            # A local name would keep a block's Grams alive while those of the next are collected.
            if index in self._todo:
                yield index, self._run_block(index, collect=True)
            else:
                self._run_block(index, collect=False)
            self._store.remove(f"hidden-{index}")
        if self.loss is None:
            self._run_head(gradient=False)
        self._store.clear()

    def _backward(self) -> _Blocks:
        """A pass forward that keeps every block's input, the head, and a pass backward."""
        if not self._todo:
            return
        lowest, count = self._todo[0], self._blocks.count
        starts = [i for i in range(self._todo[-1] + 1, count + 1) if self._has(f"gradient-{i}")]
        start = min(starts, default=count)
        self._keep_hidden(range(lowest, start if starts else count + 1))
        if not starts:
            self._run_head(gradient=True)
        self._store.remove(f"hidden-{count}")
        for index in reversed(range(lowest, start)):
            if index in self._todo:
                yield index, self._differentiate(index, collect=True, pass_on=index > lowest)
            elif not self._has(f"gradient-{index}"):
                self._differentiate(index, collect=False, pass_on=True)
            self._store.remove(f"hidden-{index}")
            self._store.remove(f"gradient-{index + 1}")
        self._store.clear()

    def _keep_hidden(self, needed: Sequence[int]) -> None:
        """Have the inputs of these blocks on disk, computing those that are missing."""
        for index in needed:
            if self._has(f"hidden-{index}"):
                continue
            start = max((i for i in range(index) if self._has(f"hidden-{i}")), default=-1)
            if start < 0:
                self._embed()
                start = 0
            for i in range(start, index):
                self._run_block(i, collect=False)
                if i < needed[0]:
                    self._store.remove(f"hidden-{i}")

    def _has(self, name: str) -> bool:
        """Whether a file is there, in every process: their steps must be the same."""
        return self._group.all(self._store.has(name))

    def _embed(self) -> None:
        with self._blocks.embeddings(), self._store.writing("hidden-0") as write, torch.no_grad():
            for number, batch in enumerate(self._batches, 1):
                hidden = self._blocks.embed(self._tokens.ids[batch], self._tokens.mask[batch])
                self._check(hidden, "the embeddings give", batch)
                write(hidden)
                self._events.progress("embedding", number, len(self._batches))

    def _run_block(self, index: int, *, collect: bool) -> dict[str, ModuleStatistics]:
        """hidden-i -> hidden-(i+1), and the block's statistics if they are to be collected."""
        blocks, masks = self._blocks, self._tokens.mask
        with (
            blocks.block(index) as block,
            self._store.writing(f"hidden-{index + 1}") as write,
            torch.no_grad(),
            self._collecting(block, index, collect) as collector,
        ):
            for number, batch in enumerate(self._batches):
                collector.begin(masks[batch])
                output = blocks.run(block, self._read(f"hidden-{index}", batch), masks[batch])
                self._check(output, f"block {index} gives", batch)
                write(output)
                self._tell("forward", index, index * len(self._batches) + number + 1)
        return collector.result()

    def _differentiate(self, index: int, *, collect: bool, pass_on: bool) -> dict[str, ModuleStatistics]:
        """hidden-i, gradient-(i+1) -> gradient-i, and the block's statistics if they are to be collected."""
        blocks, masks = self._blocks, self._tokens.mask
        with (
            blocks.block(index) as block,
            self._store.writing(f"gradient-{index}", dry=not pass_on) as write,
            self._collecting(block, index, collect) as collector,
        ):
            for number, batch in enumerate(self._batches):
                hidden = self._read(f"hidden-{index}", batch).requires_grad_()
                collector.begin(masks[batch])
                with torch.enable_grad():
                    output = blocks.run(block, hidden, masks[batch])
                torch.autograd.backward(output, self._read(f"gradient-{index + 1}", batch))
                assert hidden.grad is not None
                self._check(hidden.grad, f"block {index} gives", batch, "gradients")
                write(hidden.grad)
                self._tell("backward", index, (blocks.count - 1 - index) * len(self._batches) + number + 1)
        return collector.result()

    def _run_head(self, *, gradient: bool) -> None:
        """hidden-L -> the loss, and gradient-L."""
        name = f"hidden-{self._blocks.count}"
        total, count = 0.0, 0
        with (
            self._blocks.head() as head,
            self._store.writing(f"gradient-{self._blocks.count}", dry=not gradient) as write,
        ):
            for number, batch in enumerate(self._batches, 1):
                hidden = self._read(name, batch)
                nll, predicted, slope = self._head_batch(head, hidden, batch, gradient)
                total, count = total + nll, count + predicted
                self._check(slope, "the head gives", batch, "gradients")
                write(slope)
                self._events.progress("head", number, len(self._batches))
            sums = self._group.add(torch.tensor([total, count], dtype=torch.float64))
            self.loss = Loss(float(sums[0]), int(sums[1]))
            self._store.loss = self.loss
        self._events.note(
            f"the model's perplexity on the calibration text is {self.loss.perplexity:,.2f} "
            f"({self.loss.tokens:,} tokens predicted)"
        )

    def _head_batch(self, head: nn.Module, hidden: Tensor, batch: slice, gradient: bool) -> tuple[float, int, Tensor]:
        """``(sum of -log p, tokens predicted, gradient with respect to hidden)`` of one batch."""
        return next_token_loss(
            head,
            hidden,
            self._tokens.ids[batch],
            self._tokens.mask[batch],
            vocabulary=self._blocks.vocabulary,
            check=lambda logits: self._check(logits, "the head gives", batch),
            draws=self._draws(batch) if self._labels == "sampled" else None,
            gradient=gradient,
        )

    def _draws(self, batch: slice) -> Tensor:
        """A uniform number for each position, the same whatever the batches and processes are."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.rand(self._draw_shape, generator=generator, dtype=torch.float64)[self._part][batch]

    def _tell(self, phase: str, index: int, done: int) -> None:
        count = self._blocks.count
        self._events.progress(phase, done, count * len(self._batches), f"block {index + 1} of {count}")

    def _read(self, name: str, batch: slice) -> Tensor:
        return self._store.read(name, batch).to(self._blocks.device)

    @contextmanager
    def _collecting(self, block: nn.Module, index: int, collect: bool) -> Iterator[Collector]:
        places = {name: self._blocks.place(suffix(name)) for name in self._modules.get(index, [])} if collect else {}
        with Collector(block, places, self._needs, self._blocks.device, self._group) as collector:
            yield collector

    def _check(self, tensor: Tensor, what: str, batch: slice, kind: str = "activations") -> None:
        """Raise where something that counts is NaN or infinite, by name."""
        if bool(torch.isfinite(tensor).all()):
            return
        type_hint = "" if self._blocks.dtype in (torch.float32, torch.float64) else " in float32"
        raise InputError(
            f"{what} NaN or infinite {kind} on the calibration text (sequences {self._part.start + batch.start} to "
            f"{self._part.start + batch.stop - 1}); check the source model{type_hint}"
        )


def _by_block(blocks: ModelBlocks, modules: Sequence[str]) -> dict[int, list[str]]:
    """Modules by block, in the order given.

    Raises:
        InputError: one is no linear layer of a block.
    """
    found: dict[int, list[str]] = {}
    for name in dict.fromkeys(modules):
        index = layer_number(name)
        if not 0 <= index < blocks.count or not blocks.is_linear(index, blocks.place(suffix(name))[0]):
            raise InputError(f"{name} is no linear layer in a block of the model, so it cannot be calibrated")
        found.setdefault(index, []).append(name)
    return found


class GramSum:
    """Sum of x x^T over rows, products and sum in float64.

    Products in float32 are not enough, even when they are summed in float64. Where a few tokens have several massive
    channels (1e3 to 1e4 times the others, as the first token of a sequence has in many models), their rounding
    drowns the small eigenvalues that a whitening lives on: at 1e4 the smallest come out wrong or negative, and a
    truncation in that metric may lose several times what it has to. As only the upper triangle is computed, float64
    takes no longer on a CPU than a plain product in float32.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Begin with zero.

        Args:
            size: length of x.
            device: where rows come from, and where the sum is kept.
        """
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [n, size]."""
        for part in rows.split(ROWS):
            exact = part.double()
            for begin in range(0, exact.shape[1], PANEL):
                end = begin + PANEL
                self._sum[begin:end, begin:].addmm_(exact[:, begin:end].T, exact[:, begin:])

    def mean(self, count: int, group: Group | None = None) -> Tensor:
        """The symmetric mean over ``count`` rows; ends the sum.

        It stays on its device, where it is used next, but for that of several processes, which is on the CPU.
        """
        mean = self._sum if group is None or group.size == 1 else group.add(self._sum.cpu())
        del self._sum
        for begin in range(0, mean.shape[0], PANEL):
            end = begin + PANEL
            corner = mean[begin:end, begin:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            mean[end:, begin:end] = mean[begin:end, end:].T
        return mean.div_(count)


class Collector:
    """Hooks on the linear layers of one block. Use as a context manager."""

    def __init__(
        self,
        block: nn.Module,
        modules: Mapping[str, tuple[str, Section | None]],
        needs: Needs,
        device: torch.device | None = None,
        group: Group | None = None,
    ) -> None:
        """Prepare.

        Args:
            block: what will be run.
            modules: name -> path within the block, and which of the outputs count; None for all of them.
            needs: what to collect; gradients need a backward pass for every forward one.
            device: where the block is.
            group: processes that collect the same from other sequences.
        """
        self._block, self._modules, self._needs = block, modules, needs
        self._group = group or Group()
        self._device = device or torch.device("cpu")
        self._leaders: dict[str, str] = {}
        self._input_grams: dict[str, GramSum] = {}
        self._output_grams: dict[str, GramSum] = {}
        self._abs: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}
        self._seen: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._handles: list[Any] = []
        self._mask = torch.zeros(0, 0, dtype=torch.bool)
        self._full = True
        self._tokens = self._samples = 0

    def __enter__(self) -> Collector:
        """Set the hooks."""
        for name, (path, section) in self._modules.items():
            self._handles.append(self._block.get_submodule(path).register_forward_hook(self._hook(name, section)))
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._seen = {}

    def begin(self, mask: Tensor) -> None:
        """Announce a batch.

        Args:
            mask: [batch, length], bool; False is padding.
        """
        self._mask, self._full = mask.to(self._device), bool(mask.all())
        self._tokens += int(mask.sum())
        self._samples += mask.shape[0]
        self._seen = {}

    def result(self) -> dict[str, ModuleStatistics]:
        """The statistics of all batches of all processes; ends the collection.

        Raises:
            InputError: an input or gradient was NaN or infinite; the layer is named.
        """
        group = self._group
        counts = group.add(torch.tensor([self._tokens, self._samples]))
        tokens, samples = map(int, counts)
        # In one order, which every process has: that in which the block calls its layers.
        grams = {name: gram.mean(tokens, group) for name, gram in self._input_grams.items()}
        absolutes = {name: group.add(total.cpu()) / tokens for name, total in self._abs.items()}
        found = {}
        for name in self._modules:
            leader = self._leaders[name]
            output = self._output_grams.pop(name, None)
            fisher = self._fisher.get(name)
            found[name] = ModuleStatistics(
                input_gram=grams.get(leader),
                output_gram=None if output is None else output.mean(tokens, group),
                input_abs=absolutes.get(leader),
                fisher=None if fisher is None else group.add(fisher.cpu()) / samples,
                tokens=tokens,
                samples=samples,
            )
            for kind, tensor in statistic_tensors(found[name]).items():
                if not bool(torch.isfinite(tensor).all()):
                    raise InputError(
                        f"{name} has NaN or infinite {'inputs' if kind.startswith('input') else 'gradients'} on the "
                        "calibration text; check the source model"
                    )
        return found

    def _hook(self, name: str, section: Section | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            # OPT hands the tokens of all sequences to its MLP in one row.
            x = args[0].detach().reshape(*self._mask.shape, -1)
            # Layers that read one tensor share its statistics. The tensor is kept until the batch is over, so that
            # no other can take its address; its version tells whether it was changed in between.
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            leader, _ = self._seen.setdefault(key, (name, x))
            known = self._leaders.setdefault(name, leader)
            assert known == leader, f"{name} shared its input with {known} before, now with {leader}"
            if leader == name:
                self._add_input(name, x)
            if self._needs.gradients:
                shape = (*self._mask.shape, output.shape[-1])

                def add(gradient: Tensor) -> None:
                    own = gradient.detach().reshape(shape)
                    self._add_gradient(name, x, own if section is None else section.of(own, own.dim() - 1))

                output.register_hook(add)

        return hook

    def _add_input(self, name: str, x: Tensor) -> None:
        rows = self._rows(x)
        if self._needs.input_gram:
            if name not in self._input_grams:
                self._input_grams[name] = GramSum(x.shape[-1], self._device)
            self._input_grams[name].add(rows)
        if self._needs.input_abs:
            total = rows.abs().sum(dim=0, dtype=torch.float64)
            self._abs[name] = self._abs[name] + total if name in self._abs else total

    def _add_gradient(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if self._needs.output_gram:
            if name not in self._output_grams:
                self._output_grams[name] = GramSum(gradient.shape[-1], self._device)
            self._output_grams[name].add(self._rows(gradient))
        if self._needs.fisher:
            total = self._fisher.get(name)
            if total is None:
                total = self._fisher[name] = torch.zeros(x.shape[-1], dtype=torch.float64, device=self._device)
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            for sample, counted in enumerate(self._mask):
                g, inputs = gradient[sample], x[sample]
                if not self._full:
                    g, inputs = g[counted], inputs[counted]
                # dL/dW [out, in] of this sequence alone.
                slope = g.to(wide).T @ inputs.to(wide)
                total += slope.square_().sum(dim=0, dtype=torch.float64)

    def _rows(self, tensor: Tensor) -> Tensor:
        """[batch, length, n] -> [tokens that are not padding, n]."""
        return tensor.reshape(-1, tensor.shape[-1]) if self._full else tensor[self._mask]


def part_statistics(whole: ModuleStatistics, section: Section) -> ModuleStatistics:
    """What is known of a part of a fused projection from the statistics of the whole.

    Args:
        whole: of all outputs, without a Fisher vector, which is a sum over them.
        section: the part's outputs.
    """
    assert whole.fisher is None
    gram = whole.output_gram
    return whole if gram is None else replace(whole, output_gram=section.of(section.of(gram), 1).contiguous())


def statistic_tensors(entry: ModuleStatistics) -> dict[str, Tensor]:
    values = {kind: getattr(entry, kind) for kind in STATISTICS}
    return {kind: tensor for kind, tensor in values.items() if tensor is not None}
