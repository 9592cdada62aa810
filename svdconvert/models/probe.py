"""A trial run of a few tokens through a checkpoint: of the whole model if it is small, else of a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.foreign import CORRECT_CONFIG, foreign_code
from svdconvert.machine.memory import give_memory_back
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.loading import load_model
from svdconvert.storage.source import Source

# Tokens of the trial run. Any ids of the vocabulary will do, as long as they differ.
PROBE = 16

# A model whose weights in float32 and files take at most this much is loaded by transformers, which tests loading too.
# It is about what a process with torch and transformers takes without a model; loading a larger one would set the peak
# memory of the whole job.
LOADED_BYTES = 500_000_000


def probe(folder: Path, source: Source) -> str:
    """Run a few tokens in float32 on the CPU and check the logits.

    Args:
        folder: the checkpoint, dense or factored; its config.json need not be there yet.
        source: the same, opened.

    Returns:
        How the model was run: ``loaded whole`` or ``block by block``.

    Raises:
        InputError: a tensor is missing, misshapen or not finite, the logits are not, or the model does not run.
        JobError: a file cannot be read.
    """
    ids = torch.arange(PROBE).remainder(int(source.config["vocab_size"]))[None]
    needed = sum(4 * info.size + info.nbytes for info in source.tensors.values())
    whole = needed <= LOADED_BYTES
    with foreign_code("a few tokens cannot be run", CORRECT_CONFIG):
        for logits in _logits_at_once(folder, source, ids) if whole else logits_by_block(source, ids):
            _check(logits, "the logits have")
    return "loaded whole" if whole else "block by block"


def _logits_at_once(folder: Path, source: Source, ids: Tensor) -> Iterator[Tensor]:
    model = load_model(folder, "cpu", torch.float32, source.config if source.whole is None else source.whole.config)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    yield logits


def logits_by_block(source: Source, ids: Tensor) -> Iterator[Tensor]:
    """A checkpoint's logits, with the weights of one block, or of a part of the head, in memory at a time.

    Of a mixture's block, with those of one expert.

    Args:
        source: dense or factored.
        ids: [batch, length], int64, no padding.

    Yields:
        [batch, length, n] in float32, the logits of the vocabulary's next n tokens.

    Raises:
        InputError: a weight is missing, misshapen or not finite, or the output of a block is not finite.
        JobError: a file cannot be read.
    """
    blocks, mask = ModelBlocks(source), torch.ones_like(ids, dtype=torch.bool)
    give_memory_back()  # what the work before has left
    hidden = blocks.embed(ids, mask)
    _check(hidden, "the embeddings give")
    for index in range(blocks.count):
        with blocks.block(index, by_expert=True) as block:
            hidden = blocks.run(block, hidden, mask)
        give_memory_back()
        _check(hidden, f"block {index} gives")
    yield from blocks.logits(hidden)


def _check(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{what} NaN or infinite values for a few tokens")
