"""Perplexity and bits per character of a text, with everything stated that they depend on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from svdconvert import documents
from svdconvert.architectures import longest_input
from svdconvert.documents import read_json
from svdconvert.errors import InputError
from svdconvert.job import resolve_device
from svdconvert.loading import compute_dtype, load_model, load_tokenizer, opening_token
from svdconvert.source import local_folder

# No text that anybody measures on is larger, and all of it is in memory.
MAX_TEXT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        model, text: what was evaluated on what.
        perplexity: exp of the mean negative log-likelihood of a token; depends on the tokenizer.
        bits_per_character: total negative log-likelihood in bits / characters of the text; does not.
        tokens, characters: what was counted.
        window, stride: length of the model's input in tokens, and how far it moves each time. Each token is
            predicted once, from between window - stride and window tokens of context (fewer at the start).
        dtype, device: what it was computed in and on.
        parameters: of the model.
        seconds: wall time.
    """

    model: str
    text: str
    perplexity: float
    bits_per_character: float
    tokens: int
    characters: int
    window: int
    stride: int
    dtype: str
    device: str
    parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result in JSON types."""
        return asdict(self)


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    revision: str | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a text file under a dense or factored model.

    The text is tokenised as one sequence after the token that opens a text, or else the one that ends it, so that its
    first token is predicted too, and read in overlapping windows.

    Args:
        model: a local folder, or a model on the Hub, which is then downloaded into the Hugging Face cache.
        text: UTF-8 text file.
        window: tokens per input; by default 1024, or the model's longest context if that is less.
        stride: tokens the window moves; by default half the window.
        batch_size: windows at a time.
        revision: branch, tag or commit on the Hub.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: called with (tokens done, tokens in all).

    Raises:
        InputError: the model or the text cannot be used.
    """
    start = time.perf_counter()
    folder = local_folder(os.fspath(model), revision)
    config = read_json(folder / "config.json", f"{folder} has no config.json, so it is no model folder")
    used = resolve_device(device)
    passage = read_passage(folder, config, Path(text).expanduser(), window, stride)
    loaded = load_model(folder, used, compute_dtype(config, used))
    total = negative_log_likelihood(loaded, passage, batch_size, progress)
    dtype = next(loaded.parameters()).dtype
    return Evaluation(
        model=str(model),
        text=str(text),
        perplexity=math.exp(total / passage.tokens),
        bits_per_character=total / math.log(2) / passage.characters,
        tokens=passage.tokens,
        characters=passage.characters,
        window=passage.window,
        stride=passage.stride,
        dtype=str(dtype).removeprefix("torch."),
        device=used,
        parameters=sum(parameter.numel() for parameter in loaded.parameters()),
        seconds=time.perf_counter() - start,
    )


# No text that anybody measures on is larger, and all of it is in memory.
MAX_TEXT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Passage:
    """A text as a model reads it.

    Attributes:
        ids: [1 + tokens] int64, the end-of-text token first.
        characters: of the text.
        window, stride: see :class:`Evaluation`.
    """

    ids: torch.Tensor
    characters: int
    window: int
    stride: int

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return self.ids.numel() - 1


def read_passage(
    folder: Path, config: Mapping[str, Any], text: Path, window: int | None, stride: int | None
) -> Passage:
    """Tokenise a text file for a model.

    Args:
        folder: the model, for its tokenizer.
        config: its config.json.
        text: UTF-8 text file.
        window, stride: in tokens; None takes the defaults of :func:`evaluate`.

    Raises:
        InputError: the text, the tokenizer or the window cannot be used.
    """
    content = read_text(text)
    longest = longest_input(config, 1024)
    window = min(1024, longest) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if not 2 <= window <= longest:
        raise InputError(f"--window {window} is not possible; the model reads from 2 to {longest} tokens")
    if not 1 <= stride < window:
        raise InputError(f"--stride {stride} must lie between 1 and {window - 1}, below the window")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(content, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    if ids.numel() == 0:
        raise InputError(f"{text} has no tokens; give a text with content")
    if int(ids.max()) >= int(config["vocab_size"]):
        raise InputError(f"the tokenizer of {folder} has more tokens than the model; it belongs to another model")
    candidates = (opening_token(tokenizer), tokenizer.eos_token_id, config.get("eos_token_id"), 0)
    first = next(token for token in candidates if isinstance(token, int))
    return Passage(torch.cat([torch.tensor([first]), ids]), len(content), window, stride)


def read_text(path: Path) -> str:
    """A UTF-8 text file with something in it.

    Raises:
        InputError: it cannot be read or is empty.
    """
    content = documents.read_text(path, f"{path} cannot be read (No such file or directory)", MAX_TEXT_BYTES)
    if not content.strip():
        raise InputError(f"{path} is empty; give a text with content")
    return content


@torch.inference_mode()
def negative_log_likelihood(
    model: torch.nn.Module,
    passage: Passage,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Sum of -log p over a passage's tokens, each predicted once.

    Args:
        model: causal language model.
        passage: the text.
        batch_size: windows at a time.
        progress: called with (tokens done, tokens in all).

    Returns:
        The sum in nats, accumulated in float64.
    """
    device = next(model.parameters()).device
    ids, window, stride, targets = passage.ids, passage.window, passage.stride, passage.tokens
    # (start, tokens whose prediction counts): the first window counts whole, a later one its last `stride` tokens.
    spans = [(0, min(window, targets))]
    while (done := spans[-1][0] + min(window, targets)) < targets:
        begin = min(spans[-1][0] + stride, targets - window)
        spans.append((begin, begin + window - done))
    total, count = 0.0, 0
    for i in range(0, len(spans), batch_size):
        batch = spans[i : i + batch_size]
        width = min(window, targets)
        inputs = torch.stack([ids[begin : begin + width] for begin, _ in batch]).to(device)
        labels = torch.stack([ids[begin + 1 : begin + 1 + width] for begin, _ in batch]).to(device)
        logits = model(input_ids=inputs, use_cache=False).logits
        for row, (_, counted) in enumerate(batch):
            losses = torch.nn.functional.cross_entropy(
                logits[row, -counted:].float(), labels[row, -counted:], reduction="none"
            )
            total += float(losses.double().sum())
            count += counted
        if progress:
            progress(count, targets)
    assert count == targets
    return total
