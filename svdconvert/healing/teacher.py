"""The dense model, as its hidden states: it is run once, block by block, and never in memory beside the other.

The last ones are those behind the final norm, so that the head alone makes predictions of them. Those behind some
of its blocks are kept in bfloat16, as they are compared, and nothing is computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.healing.precision import computing
from svdconvert.machine import processes
from svdconvert.models.activations import ActivationStore, check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.head import Head, whole_head
from svdconvert.models.stream import Stream
from svdconvert.planning.events import Events
from svdconvert.version import __version__

_STATES = "states"


class Teacher:
    """The dense model's hidden states of some sequences, in files.

    Attributes:
        sequences: their numbers in the text, int64.
    """

    def __init__(
        self,
        blocks: ModelBlocks,
        tokens: CalibrationTokens,
        sequences: Tensor,
        folder: Path,
        key: Mapping[str, Any],
        *,
        batch_size: int,
        precision: torch.dtype,
        behind: Sequence[int] = (),
    ) -> None:
        """Prepare.

        Args:
            blocks: the dense model.
            tokens: the text.
            sequences: numbers of those that are needed.
            folder: where the files are.
            key: what they depend on beside the sequences, in JSON types.
            batch_size: sequences at a time.
            precision: of the matrix products.
            behind: blocks whose outputs are kept.
        """
        self._blocks, self._precision, self.sequences, self._behind = blocks, precision, sequences, behind
        self._places = {int(number): place for place, number in enumerate(sequences)}
        ids, mask = tokens.ids[sequences], tokens.mask[sequences]
        whole = {**key, "numbers": sequences.tolist(), "precision": str(precision)}
        self._stream = Stream(blocks, ids, mask, folder / "way", whole, name="the dense model", batch_size=batch_size)
        whole |= {"batch_size": batch_size, "device": blocks.device.type, "code": [__version__, torch.__version__]}
        self._store = ActivationStore(folder / "last", whole, (*ids.shape, blocks.width), blocks.dtype)
        whole |= {"behind": [*behind]}
        self._outputs = ActivationStore(folder / "behind", whole, (*ids.shape, blocks.hidden_size), torch.bfloat16)

    def run(self, events: Events, what: str) -> None:
        """Compute the states, or what is left of them.

        Args:
            events: receiver of progress.
            what: the sequences, in a word.

        Raises:
            InputError: the dense model gives no finite numbers, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        blocks, stream = self._blocks, self._stream
        if self._store.has(_STATES) and all(self._outputs.has(_output(index)) for index in self._behind):
            return
        check_room({stream.store: 2, self._outputs: len(self._behind)})
        with computing(blocks.device, self._precision):
            for index in range(stream.begin(), blocks.count):
                self._keep_output(index - 1)
                events.progress("dense model", index, blocks.count, what)
                with blocks.block(index) as block:
                    stream.step(block, index)
                stream.forget(index)
        self._keep_output(blocks.count - 1)
        with blocks.final() as final, self._store.writing(_STATES) as write, torch.no_grad():
            for batch in stream.batches:
                write(final(stream.read(blocks.count, batch)))
        stream.forget(blocks.count)
        events.progress("dense model", blocks.count, blocks.count, what)

    def _keep_output(self, index: int) -> None:
        """Keep a block's output, the next one's input, if it is one of those."""
        if index not in self._behind or self._outputs.has(_output(index)):
            return
        with self._outputs.writing(_output(index)) as write:
            for batch in self._stream.batches:
                write(self._stream.read(index + 1, batch))

    def states(self, sequences: Tensor) -> Tensor:
        """What goes into the head: [n, length, width] on the device.

        Args:
            sequences: numbers of n sequences.
        """
        return self._read(self._store, _STATES, sequences)

    def behind(self, index: int, sequences: Tensor) -> Tensor:
        """What comes out of a block: [n, length, hidden] bfloat16 on the device.

        Args:
            index: of the block, one of those that are kept.
            sequences: numbers of n sequences.
        """
        return self._read(self._outputs, _output(index), sequences)

    def _read(self, store: ActivationStore, name: str, sequences: Tensor) -> Tensor:
        places = [self._places[int(number)] for number in sequences]
        return torch.cat([store.read(name, slice(place, place + 1)) for place in places]).to(self._blocks.device)


def _output(index: int) -> str:
    """Name of a block's output among the files."""
    return f"block-{index}"


class States(Protocol):
    """The dense model's hidden states of some sequences.

    Attributes:
        sequences: their numbers in the text, int64.
    """

    sequences: Tensor

    def states(self, sequences: Tensor) -> Tensor:
        """What goes into the head: [n, length, width] on the device, of n sequences by their numbers."""
        ...

    def behind(self, index: int, sequences: Tensor) -> Tensor:
        """What comes out of a block: [n, length, hidden] on the device, of n sequences by their numbers."""
        ...


class SharedTeacher:
    """The states of some sequences, of which each process has computed a part.

    Attributes:
        sequences: their numbers in the text, int64.
    """

    def __init__(self, sequences: Tensor, part: Callable[[Tensor, str], Teacher], events: Events, name: str) -> None:
        """Compute this process's part, or what is left of it, and wait for the others.

        Args:
            sequences: numbers of all.
            part: makes the teacher of some of them; the name of its files is the other argument.
            events: receiver of progress.
            name: of the sequences, for files and people.

        Raises:
            InputError, JobError: see :meth:`Teacher.run`.
        """
        group, self.sequences = processes.current(), sequences
        places = range(group.size)
        numbers = [sequences[len(sequences) * i // group.size : len(sequences) * (i + 1) // group.size] for i in places]
        files = [name if group.size == 1 else f"{name}-{i}-of-{group.size}" for i in places]
        # The others' files are opened when they are complete: whoever opens them first, begins them.
        own = None
        if len(numbers[group.rank]):
            own = part(numbers[group.rank], files[group.rank])
            own.run(events, f"{name} sequences")
        group.wait()
        self._parts = [
            own if i == group.rank and own is not None else part(numbers[i], files[i])
            for i in places
            if len(numbers[i])
        ]
        self._owner = {int(number): one for one in self._parts for number in one.sequences}

    def states(self, sequences: Tensor) -> Tensor:
        """See :meth:`States.states`."""
        return torch.cat([self._owner[int(number)].states(number[None]) for number in sequences])

    def behind(self, index: int, sequences: Tensor) -> Tensor:
        """See :meth:`States.behind`."""
        return torch.cat([self._owner[int(number)].behind(index, number[None]) for number in sequences])


@contextmanager
def teacher_head(blocks: ModelBlocks, head: Head) -> Iterator[Head | None]:
    """Have the dense model's head on the device, if it is another one than the compressed model's; gives None else.

    Args:
        blocks: the dense model.
        head: the compressed model's, whole.
    """
    with blocks.output() as output, head.part(0) as own:
        theirs, ours = output.state_dict(), own.state_dict()
        same = theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
        if not same:
            yield whole_head(output, blocks.vocabulary)
            return
    yield None
