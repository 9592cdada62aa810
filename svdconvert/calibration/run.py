"""Statistics of a model's linear layers on calibration text, block by block.

If gradients are needed, a forward pass keeps each block's input on disk; the head then gives the gradient at the last
block's output, and the blocks are run again from last to first, each with the gradient of the one above it. Otherwise
one forward pass is enough.

Memory, with B sequences of T tokens in a batch, N in all, and hidden size h. On the device: the weights of one block,
or of the embeddings (on the CPU of a batch's tokens alone), or of the head, a large one in parts, in the computing
type; the statistics of one block (``collector.py``); and the logits of :mod:`svdconvert.models.loss`, a few times over.
On the host: a batch of activations and, with several processes on devices of their own, the block's Grams once more. On
disk: N T h numbers for each block if gradients are needed, for two blocks if not.

Of a block whose experts' statistics are too many for that (``planning/expert_groups.py``), only those of all else come
of a pass through it. That pass keeps what goes into the block's mixture and the gradient at what comes out, N T h
numbers each; then the mixture is run again for some experts after the other, the others left out. So all experts are
run twice, whatever the number of groups, and the sums are the same to the bit. They wait on disk (``expert_files.py``).
Where experts are large, the weights of each are in memory only while it is run.

Several processes take a part of the sequences each, and each has files of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.calibration.boundaries import Boundaries
from svdconvert.calibration.collector import Collector, refuse_nonfinite
from svdconvert.calibration.expert_files import ExpertFiles
from svdconvert.calibration.experts import Common, expert_statistics
from svdconvert.calibration.grouping import groups_of, reads_by_expert
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.linalg.precision import is_finite
from svdconvert.machine.memory import give_memory_back
from svdconvert.machine.processes import current
from svdconvert.machine.products import multiplied_by
from svdconvert.methods.statistics import STATISTICS, ModuleStatistics, Needs
from svdconvert.models.activations import Loss
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.calls import block_output
from svdconvert.models.head import Head
from svdconvert.models.loss import head_batches, next_token_loss
from svdconvert.models.tokenizer import OWN_TOKENIZER
from svdconvert.names import expert, layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.sentences import asked
from svdconvert.settings.text import LABELS
from svdconvert.storage.source import Source
from svdconvert.version import __version__

_Blocks = Generator[tuple[int, dict[str, ModuleStatistics]], None, None]


class StatisticsRun(Iterator[tuple[int, dict[str, ModuleStatistics]]]):
    """An iterator over ``(block, {module: ModuleStatistics})``.

    From the first block to the last or, if gradients are needed, from the last to the first. A block with many experts
    comes in several parts, one after the other. A block's files are removed when the next one is asked for. Release
    statistics by the time when the next ones are asked for: they are most of the memory.

    Activations between blocks are files in a folder, so an interrupted run continues from its last finished block with
    the same bits; files of another model, text or setting are removed. At the end all are removed.

    Attributes:
        loss: the model's loss; known with the first block if gradients are needed, otherwise at the end. None if there
            was nothing left to do.
    """

    def __init__(
        self,
        source: Source,
        tokens: CalibrationTokens,
        needs: Needs,
        modules: Sequence[str],
        *,
        work: Path,
        device: str = "cpu",
        batch_size: int = 4,
        dtype: torch.dtype = torch.float32,
        labels: str = "empirical",
        seed: int = 0,
        skip_blocks: Collection[int] = (),
        events: Events | None = None,
        exact: bool = True,
    ) -> None:
        """Make all checks that need no weights.

        Args:
            source: the dense model. Its files are read twice if gradients are needed, and not released.
            tokens: to calibrate with.
            needs: statistics to collect.
            modules: linear layers, as ``layers.3.attention.dense``, or parts of fused ones (``families/fused.py``),
                whose outputs are then their own.
            work: folder for activations and gradients.
            device: that blocks run on.
            batch_size: sequences at a time; changes results by rounding only.
            dtype: that blocks compute in; gradients of single tokens underflow in float16.
            labels: ``empirical`` takes the text's next tokens; ``sampled`` draws them from the model's distribution at
                each position (the true Fisher instead of the empirical one).
            seed: of the drawing.
            skip_blocks: blocks whose statistics are not needed any more.
            events: receives the loss and the progress.
            exact: whether all products of Grams are to be float64; metrics that are shrunk need not be.

        Raises:
            InputError: a module does not exist, the tokens are not the model's, or the disk is too small. While it
                runs: something is NaN or infinite.
            JobError: reading or writing failed; the same run continues later.
        """
        if labels not in LABELS:
            raise InputError(f"{asked('calibration.labels', labels)} is unknown; choose {' or '.join(LABELS)}")
        if batch_size < 1:
            raise InputError(f"{asked('calibration.batch_size', batch_size)} is too small; use at least 1")
        self._blocks = ModelBlocks(source, device=device, dtype=dtype)
        self._source = source
        self._name, self._tokens, self._needs, self._labels, self._seed = source.name, tokens, needs, labels, seed
        self._exact = exact
        self._events, self._group = events or Events(), current()
        self._check_tokens()
        self._draw_shape, self._part = tokens.ids.shape, self._group.portion(tokens.ids.shape[0])
        self._tokens = replace(tokens, ids=tokens.ids[self._part], mask=tokens.mask[self._part])
        count = self._tokens.ids.shape[0]
        self._batches = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        self._modules = _by_block(self._blocks, modules)
        self._todo = sorted(set(self._modules) - set(skip_blocks)) if needs != Needs() else []
        found = {index: groups_of(self._blocks, index, self._modules[index], needs) for index in self._todo}
        self._groups = {index: groups for index, groups in found.items() if groups is not None}
        self._experts_folder = work / "experts"
        kept = sum(path.stat().st_size for path in self._experts_folder.glob("*.safetensors"))  # by an interrupted run
        self._content = self._key(tokens.digest, batch_size)
        self._files = Boundaries(
            work / "activations",
            self._content,
            (*self._tokens.ids.shape, self._blocks.hidden_size),
            dtype=dtype,
            device=self._blocks.device,
            copies=self._copies(),
            group=self._group,
            more=max(0, max((groups.nbytes for groups in self._groups.values()), default=0) - kept),
        )
        self.loss: Loss | None = self._files.loss
        self._starved: dict[str, int] = {}
        self._generator = self._backward() if needs.gradients else self._forward()

    def __next__(self) -> tuple[int, dict[str, ModuleStatistics]]:
        return next(self._generator)

    def modules(self, index: int) -> Sequence[str]:
        """The layers whose statistics come of a block, in one part or in several."""
        return self._modules[index]

    def refuse_changed(self) -> None:
        """As :meth:`svdconvert.storage.source.Source.refuse_changed`."""
        self._source.refuse_changed()

    def close(self) -> None:
        """Stop; what is finished stays for the next run."""
        self._generator.close()

    def _copies(self) -> int:
        """The most files between blocks that exist at a time; none where a run backward has nothing left to do."""
        if not self._needs.gradients:
            return 3 if self._groups else 2
        return self._blocks.count + (4 if self._groups else 2) if self._todo else 0

    def _key(self, tokens: str, batch_size: int) -> dict[str, Any]:
        """All that the files between blocks depend on."""
        return {
            "model": self._source.identity(),
            "config": dict(self._source.config),
            "tokens": tokens,
            "part": [self._part.start, self._part.stop],
            "batch_size": batch_size,
            "dtype": str(self._blocks.dtype),
            "device": self._blocks.device.type,
            "labels": self._labels,
            "seed": self._seed,
            "code": [__version__, torch.__version__, multiplied_by(self._blocks.device.type)],
        }

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
                f"the tokenizer belongs to another model, so {OWN_TOKENIZER}"
            )
        if blocks.longest is not None and ids.shape[1] > blocks.longest:
            raise InputError(
                f"calibration sequences of {ids.shape[1]:,} tokens are too long; {self._name} reads up to "
                f"{blocks.longest:,}"
            )

    def _forward(self) -> _Blocks:
        """One pass; statistics of inputs alone."""
        count = self._blocks.count
        present = [i for i in range(count + 1) if self._files.has_hidden(i)]
        if self._todo:
            present = [i for i in present if i <= self._todo[0]]
        elif self.loss is not None or not present:
            return
        start = max(present, default=0)
        if not present:
            self._embed()
        for index in range(start, count):
            if index in self._todo:
                yield from self._collect(index, self._run_block)
            else:
                self._run_block(index)
            self._files.drop_hidden(index)
        if self.loss is None:
            self._run_head(gradient=False)
        self._finish()

    def _backward(self) -> _Blocks:
        """A pass forward that keeps every block's input, the head, and a pass backward."""
        if not self._todo:
            return
        lowest, count = self._todo[0], self._blocks.count
        starts = [i for i in range(self._todo[-1] + 1, count + 1) if self._files.has_gradient(i)]
        start = min(starts, default=count)
        self._keep_hidden(range(lowest, start if starts else count + 1))
        if not starts:
            self._run_head(gradient=True)
        self._files.drop_hidden(count)
        for index in reversed(range(lowest, start)):
            if index in self._todo:
                yield from self._collect(index, partial(self._differentiate, pass_on=index > lowest))
            elif not self._files.has_gradient(index):
                self._differentiate(index)
            self._files.drop_hidden(index)
            self._files.drop_gradient(index + 1)
        self._finish()

    def _keep_hidden(self, needed: Sequence[int]) -> None:
        """Compute the inputs of these blocks that are not on disk yet."""
        for index in needed:
            if self._files.has_hidden(index):
                continue
            start = max((i for i in range(index) if self._files.has_hidden(i)), default=-1)
            if start < 0:
                self._embed()
                start = 0
            for i in range(start, index):
                self._run_block(i)
                if i < needed[0]:
                    self._files.drop_hidden(i)

    def _embed(self) -> None:
        with self._files.writing_hidden(0) as write, torch.no_grad():
            for number, batch in enumerate(self._batches, 1):
                hidden = self._blocks.embed(self._tokens.ids[batch], self._tokens.mask[batch])
                self._check(hidden, "the embeddings give", batch)
                write(hidden)
                self._events.progress("embedding", number, len(self._batches))

    def _collect(self, index: int, run: Callable[..., dict[str, ModuleStatistics]]) -> _Blocks:
        """The statistics of a block, in one part or in several.

        Args:
            index: of the block.
            run: runs it; takes its layers whose statistics are wanted.
        """
        # nothing that is collected gets a local name, which would keep it alive while the next is
        if index not in self._groups:
            yield index, run(index, self._modules[index])
            return
        groups, others = self._groups[index].layers, self._groups[index].others
        if others:
            yield index, run(index, others, keep_mixture=True)
        else:
            run(index, keep_mixture=True)
        key = {**self._content, "part": self._group.size, "needs": asdict(self._needs), "exact": self._exact}
        files = ExpertFiles(self._experts_folder, key, index, groups, self._group)
        done = files.first_missing()
        common = files.common(done - 1)
        for place in range(done, len(groups)):
            self._run_experts(index, place, files, common)
        for place in range(len(groups)):
            yield index, self._of_group(files, place, common)
        files.clear()
        self._files.drop_mixture(index)

    def _of_group(self, files: ExpertFiles, place: int, common: Common) -> dict[str, ModuleStatistics]:
        """The statistics of a group of experts."""
        sums, tokens, samples = files.read(place)
        self._starved |= sums.starved
        return expert_statistics(sums, common, tokens, samples)

    def _run_experts(self, index: int, place: int, files: ExpertFiles, common: Common) -> None:
        """Run a group of experts on what their mixture was given, and keep their sums."""
        blocks, masks, gradients = self._blocks, self._tokens.mask, self._needs.gradients
        groups = self._groups[index].layers
        names = groups[place]
        give_memory_back()
        with (
            blocks.some_experts(index, {expert(suffix(n)) for n in names}, reads_by_expert(blocks, index)) as block,
            self._collecting(block, names) as collector,
            torch.set_grad_enabled(gradients),
        ):
            mixture = blocks.mixture(block)
            for number, batch in enumerate(self._batches):
                hidden, gradient = self._files.mixture(index, batch)
                collector.begin(masks[batch])
                output = block_output(mixture(hidden.requires_grad_(gradients)))
                if gradients:
                    torch.autograd.backward(output, gradient)
                self._events.progress(
                    "experts",
                    place * len(self._batches) + number + 1,
                    len(groups) * len(self._batches),
                    f"block {index + 1} of {blocks.count}",
                )
        sums, tokens, samples = collector.expert_sums()
        for kind in STATISTICS:
            for name, tensor in getattr(sums, kind).items():
                refuse_nonfinite(name, {kind: tensor})
        common.add(sums)
        files.save(place, sums, common, tokens, samples)

    def _run_block(
        self, index: int, modules: Sequence[str] = (), *, keep_mixture: bool = False
    ) -> dict[str, ModuleStatistics]:
        """Input of a block -> input of the next one; the statistics of some of its layers."""
        blocks, masks = self._blocks, self._tokens.mask
        with (
            self._block(index, keep_mixture) as block,
            self._files.writing_hidden(index + 1) as write,
            torch.no_grad(),
            self._collecting(block, modules) as collector,
        ):
            for number, batch in enumerate(self._batches):
                collector.begin(masks[batch])
                output = blocks.run(block, self._files.hidden(index, batch), masks[batch])
                self._check(output, f"block {index} gives", batch)
                write(output)
                self._tell("forward", index, index * len(self._batches) + number + 1)
        return self._result(collector)

    def _differentiate(
        self, index: int, modules: Sequence[str] = (), *, pass_on: bool = True, keep_mixture: bool = False
    ) -> dict[str, ModuleStatistics]:
        """Gradient at a block's output -> gradient at its input; the statistics of some of its layers."""
        blocks, masks = self._blocks, self._tokens.mask
        give_memory_back()
        with (
            self._block(index, keep_mixture) as block,
            self._files.writing_gradient(index, dry=not pass_on) as write,
            self._collecting(block, modules) as collector,
        ):
            for number, batch in enumerate(self._batches):
                hidden = self._files.hidden(index, batch).requires_grad_()
                collector.begin(masks[batch])
                with torch.enable_grad():
                    output = blocks.run(block, hidden, masks[batch])
                torch.autograd.backward(output, self._files.gradient(index + 1, batch))
                assert hidden.grad is not None
                self._check(hidden.grad, f"block {index} gives", batch, "gradients")
                write(hidden.grad)
                self._tell("backward", index, (blocks.count - 1 - index) * len(self._batches) + number + 1)
        return self._result(collector)

    def _result(self, collector: Collector) -> dict[str, ModuleStatistics]:
        """The statistics of a block; which experts they are uncertain of is told at the end."""
        found = collector.result()
        self._starved |= collector.starved
        return found

    def _finish(self) -> None:
        """Say what has to be said, and remove all files."""
        self._tell_starved()
        self._files.clear()
        if self._group.leader:  # what waited of a block that was taken whole before the next was asked for
            shutil.rmtree(self._experts_folder, ignore_errors=True)

    def _tell_starved(self) -> None:
        """Say which experts saw few tokens, and what is done about it."""
        if not self._starved:
            return
        name, fewest = min(self._starved.items(), key=lambda item: item[1])
        count = "1 expert has" if len(self._starved) == 1 else f"{len(self._starved):,} experts have"
        self._events.note(
            f"{count} seen fewer tokens than channels ({name}: {fewest:,}), so what all experts of the block have in "
            "common counts for much in their metrics; more text helps"
        )

    def _run_head(self, *, gradient: bool) -> None:
        """Output of the last block -> the loss; with ``gradient``, the gradient at that output."""
        total, count = 0.0, 0
        give_memory_back()
        with (
            self._blocks.head() as head,
            self._files.writing_gradient(self._blocks.count, dry=not gradient) as write,
        ):
            batches = head_batches(self._batches, self._tokens.ids.shape[1], head)
            for number, batch in enumerate(batches, 1):
                hidden = self._files.hidden(self._blocks.count, batch)
                nll, predicted, slope = self._head_batch(head, hidden, batch, gradient)
                total, count = total + nll, count + predicted
                self._check(slope, "the head gives", batch, "gradients")
                write(slope)
                self._events.progress("head", number, len(batches))
            sums = self._group.add(torch.tensor([total, count], dtype=torch.float64))
            self.loss = Loss(float(sums[0]), int(sums[1]))
            self._files.keep_loss(self.loss)
        self._events.note(
            f"the model's perplexity on the calibration text is {self.loss.perplexity:,.2f} "
            f"({self.loss.tokens:,} tokens predicted)"
        )

    def _head_batch(self, head: Head, hidden: Tensor, batch: slice, gradient: bool) -> tuple[float, int, Tensor]:
        """``(sum of -log p, tokens predicted, gradient with respect to hidden)`` of one batch."""
        return next_token_loss(
            head,
            hidden,
            self._tokens.ids[batch],
            self._tokens.mask[batch],
            check=lambda logits: self._check(logits, "the head gives", batch),
            draws=self._draws(batch) if self._labels == "sampled" else None,
            gradient=gradient,
        )

    def _draws(self, batch: slice) -> Tensor:
        """A uniform number for each position, whatever the batches and processes are."""
        generator = torch.Generator().manual_seed(self._seed)
        return torch.rand(self._draw_shape, generator=generator, dtype=torch.float64)[self._part][batch]

    def _tell(self, phase: str, index: int, done: int) -> None:
        count = self._blocks.count
        self._events.progress(phase, done, count * len(self._batches), f"block {index + 1} of {count}")

    @contextmanager
    def _block(self, index: int, keep_mixture: bool) -> Iterator[nn.Module]:
        """A block with its weights, those of large experts one by one.

        Args:
            index: of the block.
            keep_mixture: whether what goes through its mixture is kept.
        """
        with self._blocks.block(index, by_expert=reads_by_expert(self._blocks, index)) as block, ExitStack() as stack:
            if keep_mixture:
                mixture = self._blocks.mixture(block)
                stack.enter_context(self._files.keeping_mixture(index, mixture, gradient=self._needs.gradients))
            yield block

    @contextmanager
    def _collecting(self, block: nn.Module, modules: Sequence[str]) -> Iterator[Collector]:
        places = {name: self._blocks.place(suffix(name)) for name in modules}
        with (
            self._blocks.routing(block) as routing,
            Collector(
                block, places, self._needs, self._blocks.device, self._group, routing, exact=self._exact
            ) as collector,
        ):
            yield collector

    def _check(self, tensor: Tensor, what: str, batch: slice, kind: str = "activations") -> None:
        """InputError if a tensor has NaN or infinite entries."""
        if is_finite(tensor):
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
            raise InputError(f"{name} is not a linear layer in a block of the model, so it cannot be calibrated")
        found.setdefault(index, []).append(name)
    return found
