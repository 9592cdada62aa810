"""A text as a model reads it: one sequence of tokens, and the windows in which they are predicted.

Perplexities of different protocols cannot be compared. There are two:

sliding: after the token that opens a text (or, without one, the token that ends it), each token of the text is
    predicted once, from between window - stride and window tokens of context (fewer at the start).
disjoint: the protocol of the literature's WikiText-2 figures (GPTQ, arXiv:2210.17323, and SVD-LLM, arXiv:2403.07378,
    among others). The text is tokenised with the tokenizer's defaults and cut into windows that do not overlap; in each
    window all tokens but the first are predicted. The rest after the last whole window is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdconvert.errors import InputError
from svdconvert.fields import COUNT, require
from svdconvert.models.tokenizer import OWN_TOKENIZER, load_tokenizer, opening_token
from svdconvert.models.windows import read_text, windows
from svdconvert.sentences import asked

_CONFIG = {"vocab_size": COUNT}


@dataclass(frozen=True)
class Passage:
    """A text as a model reads it.

    Attributes:
        ids: [N] int64.
        characters: of the text.
        window: tokens of a window.
        stride: tokens by which the window moves.
        protocol: row of :data:`svdconvert.models.windows.PROTOCOLS`.
        opening: the token before the text, as text, or None.
    """

    ids: torch.Tensor
    characters: int
    window: int
    stride: int
    protocol: str = "sliding"
    opening: str | None = None

    @property
    def width(self) -> int:
        """Tokens that go into the model at a time."""
        return self.window - 1 if self.protocol == "disjoint" else min(self.window, self.ids.numel() - 1)

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(counted for _, counted in self.spans())

    def spans(self) -> list[tuple[int, int]]:
        """``(start, counted)`` of each input; its last ``counted`` predictions count."""
        if self.protocol == "disjoint":
            return [(i * self.window, self.window - 1) for i in range(self.ids.numel() // self.window)]
        targets = self.ids.numel() - 1
        found = [(0, min(self.window, targets))]
        while (done := found[-1][0] + self.width) < targets:
            begin = min(found[-1][0] + self.stride, targets - self.window)
            found.append((begin, begin + self.window - done))
        return found

    def batch(self, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels, [len(spans), width] each, of some of the spans."""
        inputs = torch.stack([self.ids[begin : begin + self.width] for begin, _ in spans])
        labels = torch.stack([self.ids[begin + 1 : begin + 1 + self.width] for begin, _ in spans])
        return inputs, labels


def read_passage(
    folder: Path,
    config: Mapping[str, Any],
    text: Path,
    window: int | None,
    stride: int | None,
    protocol: str = "sliding",
) -> Passage:
    """Tokenise a text file for a model.

    Args:
        folder: the model, for its tokenizer.
        config: its config.json.
        text: UTF-8 text file.
        window: in tokens; None takes the protocol's, or the model's longest context if that is shorter.
        stride: in tokens; None takes half the window. Not with ``disjoint``.
        protocol: row of :data:`svdconvert.models.windows.PROTOCOLS`.

    Raises:
        InputError: the text, the tokenizer, the window or the protocol cannot be used.
    """
    require(config, _CONFIG, f"config.json of {folder}", "correct it")
    content = read_text(text)
    window, stride = windows(config, window, stride, protocol)
    tokenizer = load_tokenizer(folder)
    disjoint = protocol == "disjoint"
    ids = tokenizer(content, return_tensors="pt", add_special_tokens=disjoint, verbose=False)["input_ids"][0]
    if ids.numel() == 0:
        raise InputError(f"{text} has no tokens; give a text with content")
    opening = opening_token(tokenizer)
    if disjoint:
        if ids.numel() < window:
            raise InputError(
                f"{text} has {ids.numel():,} tokens, less than one window of {window:,}; lower {asked('window')}"
            )
    else:
        candidates = (opening, tokenizer.eos_token_id, config.get("eos_token_id"), 0)
        opening = next(token for token in candidates if type(token) is int and token >= 0)
        ids = torch.cat([torch.tensor([opening]), ids])
    if int(ids.max()) >= config["vocab_size"]:
        raise InputError(
            f"the tokenizer of {folder} has more tokens than the model, so it belongs to another model; {OWN_TOKENIZER}"
        )
    name = None if opening is None else str(tokenizer.convert_ids_to_tokens(opening))
    return Passage(ids, len(content), window, stride, protocol, name)
