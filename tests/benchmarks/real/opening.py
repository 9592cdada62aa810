"""What a model loses on sequences that do not begin with the token that opens a text.

    python -m tests.benchmarks.real.opening --texts wikitext2

Sequences that are cut from a stream of documents do not begin with it. Prints the perplexity of the same tokens of the
test text without and behind that token, in sequences of 512 tokens, as in calibration, and of 2,048.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from svdconvert.models.loading import load_model
from svdconvert.models.tokenizer import load_tokenizer, opening_token

from .subjects import FOLDER, SUBJECTS, model

TOKENS = 4096


@torch.inference_mode()
def perplexity(loaded: Any, ids: torch.Tensor, opening: int | None) -> float:
    """Of all tokens of sequences but their first ones.

    Args:
        loaded: causal language model.
        ids: [N, length] without opening tokens.
        opening: the token to put before each, or None.
    """
    total = 0.0
    for row in ids:
        first = [] if opening is None else [opening]
        logits = loaded(input_ids=torch.cat([torch.tensor(first, dtype=torch.int64), row])[None]).logits[
            0, len(first) :
        ]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    return math.exp(total / (ids.numel() - len(ids)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.opening")
    parser.add_argument("--texts", type=Path, required=True, help="folder with wiki.test.tokens")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps models")
    options = parser.parse_args()
    text = (options.texts / "wiki.test.tokens").read_text(encoding="utf-8")
    for subject in SUBJECTS.values():
        path = model(subject, options.folder)
        tokenizer, loaded = load_tokenizer(path), load_model(path, "cpu", torch.float32)
        opening = opening_token(tokenizer)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0, :TOKENS]
        for length in (512, 2048):
            rows = ids.view(-1, length)
            behind = (
                "its tokenizer has none" if opening is None else f"behind it {perplexity(loaded, rows, opening):.2f}"
            )
            print(f"{subject.name}, sequences of {length}: without {perplexity(loaded, rows, None):.2f}, {behind}")


if __name__ == "__main__":
    main()
