"""Perplexity and bits per character of a text, with everything stated that they depend on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from svdconvert.errors import InputError
from svdconvert.machine.devices import resolve_device
from svdconvert.models.divergence import Divergence, likelihoods
from svdconvert.models.loading import compute_dtype, load_model
from svdconvert.models.passages import Passage, read_passage
from svdconvert.nats import perplexity
from svdconvert.paths import path_or_text, user_path
from svdconvert.sentences import asked
from svdconvert.settings.row import count
from svdconvert.storage.opening import local_folder
from svdconvert.storage.source import read_config


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        model, text: what was evaluated on what.
        protocol: how the text was read, row of :data:`svdconvert.models.windows.PROTOCOLS`.
        perplexity: exp of the mean negative log-likelihood of a token; depends on the tokenizer.
        bits_per_character: total negative log-likelihood in bits / characters of the text; does not. None where the
            protocol does not predict the whole text.
        tokens, characters: predicted tokens; characters of the text.
        opening: the token before the text, or None.
        window, stride: length of the model's input in tokens, and how far it moves each time.
        dtype, device: what it was computed in and on.
        parameters: of the model.
        seconds: wall time.
        against: the model it was compared with, or None.
        divergence: how far its predictions are from that one's, or None.
    """

    model: str
    text: str
    protocol: str
    perplexity: float
    bits_per_character: float | None
    tokens: int
    characters: int
    opening: str | None
    window: int
    stride: int
    dtype: str
    device: str
    parameters: int
    seconds: float
    against: str | None = None
    divergence: Divergence | None = None

    def to_json(self) -> dict[str, Any]:
        """The result in JSON types."""
        return asdict(self)


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    protocol: str = "sliding",
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    against: str | os.PathLike[str] | None = None,
    against_revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a text file under a dense or factored model, and how faithful it is to another one.

    Args:
        model: a local folder or GGUF file, or a model on the Hub, which is then downloaded into the Hugging Face cache.
        text: UTF-8 text file.
        protocol: ``sliding``, or ``disjoint`` as the literature has it, see :mod:`svdconvert.models.passages`.
        window: tokens per input; by default 1024 (disjoint: 2048), or the model's longest context if that is less.
        stride: tokens the window moves; by default half the window.
        batch_size: windows at a time; None: 8, or fewer where their logits would take more than a gigabyte.
        revision: branch, tag or commit on the Hub.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        against: the model that it was made from; both are then in memory at the same time.
        against_revision: its branch, tag or commit on the Hub.
        progress: called with (tokens done, tokens in all).

    Raises:
        InputError: a model or the text cannot be used, or the two do not read the text as the same tokens.
    """
    start = time.perf_counter()
    batch_size = None if batch_size is None else count("batch_size", batch_size)
    folder, passage = _passage(model, revision, text, window, stride, protocol)
    other = None
    if against is not None:
        other, theirs = _passage(against, against_revision, text, window, stride, protocol)
        if not torch.equal(passage.ids, theirs.ids) or passage.window != theirs.window:
            raise InputError(
                f"{model} and {against} read {text} as different tokens or windows; compare models of one tokenizer, "
                f"with one {asked('window')}"
            )
    used = resolve_device(device)
    loaded = _load(folder, used)
    reference = None if other is None else _load(other, used)
    likelihood = likelihoods(loaded, passage, batch_size, progress, reference)
    mean = likelihood.negative / passage.tokens
    return Evaluation(
        model=str(model),
        text=str(text),
        protocol=protocol,
        perplexity=perplexity(mean),
        bits_per_character=likelihood.negative / math.log(2) / passage.characters if protocol == "sliding" else None,
        tokens=passage.tokens,
        characters=passage.characters,
        opening=passage.opening,
        window=passage.window,
        stride=passage.stride,
        dtype=str(next(loaded.parameters()).dtype).removeprefix("torch."),
        device=used,
        parameters=sum(parameter.numel() for parameter in loaded.parameters()),
        seconds=time.perf_counter() - start,
        against=None if against is None else str(against),
        divergence=likelihood.divergence,
    )


def _passage(
    model: str | os.PathLike[str],
    revision: str | None,
    text: str | os.PathLike[str],
    window: int | None,
    stride: int | None,
    protocol: str,
) -> tuple[Path, Passage]:
    folder = local_folder(path_or_text(model), revision)
    return folder, read_passage(folder, read_config(folder), user_path(text), window, stride, protocol)


def _load(folder: Path, device: str) -> torch.nn.Module:
    return load_model(folder, device, compute_dtype(read_config(folder), device))


def negative_log_likelihood(
    model: torch.nn.Module,
    passage: Passage,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Sum of -log p of a passage's predicted tokens, in nats; see :func:`svdconvert.models.divergence.likelihoods`."""
    return likelihoods(model, passage, batch_size, progress).negative
