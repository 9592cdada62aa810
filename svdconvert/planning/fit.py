"""From a device's memory to the size of a result. No torch.

A model that answers takes its weights, and keys and values of every token of one sequence, in the type of the weights.
A model that is fine-tuned whole by AdamW in float32 takes 16 bytes for every parameter, and activations of one
sequence: what goes into every block, which gradient checkpointing keeps, and, as large as logits, these, their
log-softmax and its gradient, which is most of it where texts are long. A tenth of the memory is left to the engine and
to what is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from svdconvert.errors import InputError
from svdconvert.families.cache import cached_numbers
from svdconvert.families.table import dense_architecture, longest_input
from svdconvert.planning.memory import FLOAT32, TRAINING_BYTES_PER_PARAMETER
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.size import TRAINING, WIDTHS
from svdconvert.storage.headers import file_layout
from svdconvert.storage.source import Source
from svdconvert.tensors import CODES, DTYPES, majority_dtype
from svdconvert.words import size as in_words

if TYPE_CHECKING:
    from svdconvert.tensors import TensorInfo

# The share that is left free, as vLLM leaves it by default.
FREE = 0.1
# Tokens of the sequence, where the model reads more.
USUAL_CONTEXT = 4096
# Arrays as large as the logits that a training step has at the same time.
LOGITS = 3


@dataclass(frozen=True)
class Room:
    """What a device's memory goes to.

    Attributes:
        memory: all of it, in bytes.
        free: what is left to the engine.
        context: tokens of the one sequence.
        sequence: bytes that this takes: its cache, or its activations.
        training: whether the model is trained.
    """

    memory: int
    free: int
    context: int
    sequence: int
    training: bool

    @property
    def weights(self) -> int:
        """Bytes that are left for weights; in training, with their gradients and moments."""
        return self.memory - self.free - self.sequence

    def __str__(self) -> str:
        what = "activations" if self.training else "cache"
        left = f"{in_words(self.weights)} for "
        if self.training:
            count = self.weights // TRAINING_BYTES_PER_PARAMETER
            left += f"{count:,} parameters of {TRAINING_BYTES_PER_PARAMETER} bytes (float32, gradients, AdamW)"
        else:
            left += "weights"
        return (
            f"{in_words(self.memory)} of memory: {in_words(self.free)} left free, {in_words(self.sequence)} for the "
            f"{what} of {self.context:,} tokens, {left}"
        )


def room_of(source: Source, request: Conversion) -> Room:
    """What the memory of a request's device goes to.

    Args:
        source: the dense model.
        request: with a device.

    Raises:
        InputError: nothing is left for weights, or the model does not read so many tokens.
    """
    size, config = request.size, source.config
    assert size.fit is not None
    row = dense_architecture(config, source.where)
    longest = longest_input(config, USUAL_CONTEXT)
    context = min(longest, USUAL_CONTEXT) if size.fit_context is None else size.fit_context
    if context > longest:
        raise InputError(
            f"{asked('fit_context', context)} is more than {source.where} reads, {longest:,} tokens; give fewer"
        )
    training = size.fit_for == TRAINING
    if training:
        sequence = context * FLOAT32 * _activations(source)
    else:
        sequence = context * _stored(source.tensors, request) * cached_numbers(row, config)
    room = Room(size.fit, int(FREE * size.fit), context, sequence, training)
    if room.weights <= 0:
        whole = enough(size.fit, _whole(source, request) - room.weights)
        what = "activations" if training else "cache"
        raise InputError(
            f"{asked('fit', size.fit)} cannot be met, since {in_words(room.free)} are left free and the {what} of "
            f"{context:,} tokens {'take' if training else 'takes'} {in_words(sequence)}; give more memory ({whole} "
            f"would do for the model as it is), or fewer tokens ({asked('fit_context')})"
        )
    return room


def enough(memory: int, lacking: int) -> str:
    """Memory that has room for more weights than another, as it is asked for: rounded up to three digits or kilobytes.

    Args:
        memory: what was asked for, in bytes.
        lacking: bytes that its weights take beyond the room there.
    """
    least = memory + math.ceil(lacking / (1 - FREE)) + 2
    step = 10 ** max(3, len(str(least)) - 3)
    return asked("fit", -(-least // step) * step)


def fitted(source: Source, request: Conversion) -> Conversion:
    """The request with the bytes or the parameters that are left where it has to fit a device; else as it is.

    Args:
        source: the dense model.
        request: what is asked for.

    Raises:
        InputError: see :func:`room_of`.
    """
    if request.size.fit is None:
        return request
    room = room_of(source, request)
    size = replace(request.size, fit_context=room.context)
    if room.training:
        size = replace(size, params=room.weights // TRAINING_BYTES_PER_PARAMETER)
    else:
        size = replace(size, bytes=room.weights)
    return replace(request, size=size)


def fits_already(room: Room, taken: int) -> InputError:
    """The refusal to convert what fits as it is.

    Args:
        room: see :func:`room_of`.
        taken: bytes of what fits.
    """
    more = " and what training keeps beside them" if room.training else ""
    return InputError(
        f"{asked('fit', room.memory)} has room for the model as it is: its weights{more} take {in_words(taken)}, and "
        f"{in_words(room.weights)} are there for them; nothing has to be converted"
    )


def fit_notes(source: Source, request: Conversion) -> list[Sentence]:
    """What a plan says of a device; nothing where there is none."""
    if request.size.fit is None:
        return []
    room = room_of(source, request)
    notes = [Sentence(f"{room}; that is {_as_size(request)}")]
    if not room.training and min(request.size.chosen_widths) < max(WIDTHS):
        notes.append(
            Sentence(
                "weights of few bits take so little only where an engine computes with packed weights; transformers "
                f"unpacks them to the type of the model: {asked('widths', [16])} has ranks alone, which fit there, too"
            )
        )
    return notes


def _as_size(request: Conversion) -> str:
    size = request.size
    return asked("params", size.params) if size.bytes is None else asked("bytes", size.bytes)


def _stored(tensors: Mapping[str, TensorInfo], request: Conversion) -> int:
    """Bytes of a number in the type of the result."""
    kept = request.output.dtype == "keep"
    code = CODES[majority_dtype(list(tensors.values())) if kept else request.output.dtype]
    return DTYPES[code][0]


def _whole(source: Source, request: Conversion) -> int:
    """Bytes that the model takes as it is, in the type of the result; in training, see the module."""
    tensors = source.tensors.values()
    beside = () if source.whole is None else source.whole.rest.values()
    if request.size.fit_for == TRAINING:
        return TRAINING_BYTES_PER_PARAMETER * sum(info.size for info in (*tensors, *beside))
    dtype = request.output.dtype
    own = [replace(info, dtype=info.dtype if dtype == "keep" else CODES[dtype]) for info in tensors]
    return file_layout([*own, *beside]).size


def _activations(source: Source) -> int:
    """Numbers that training keeps of a token, see the module."""
    row = dense_architecture(source.config, source.where)
    shapes = row.parameters(source.config)
    vocabulary, hidden = shapes[row.embedding]
    blocks = f"{row.prefix}{row.pieces.blocks}."
    count = len({name.removeprefix(blocks).partition(".")[0] for name in shapes if name.startswith(blocks)})
    return count * hidden + LOGITS * vocabulary
