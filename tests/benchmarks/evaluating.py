"""CPU seconds of ``evaluate`` against those of the loop that one would write with transformers, for both protocols.

    python -m tests.benchmarks.evaluating --out out/benchmarks

By default on the bundled model and its held-out text. Both sides load the model, tokenise the text, and run windows of
the same tokens, a batch of 8 at a time; they take turns, and the least of the rounds counts. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from svdconvert import evaluate
from svdconvert.models.windows import PROTOCOLS

from .harness import BUNDLED, new_parser, page
from .measure import machine, markdown_table, save

BATCH = 8


def plain(model: Path, text: Path, protocol: str, window: int) -> float:
    """The perplexity by transformers alone; ``sliding`` moves by half a window and counts the new tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=protocol == "disjoint")
    ids = ids["input_ids"][0]
    if protocol == "disjoint":
        windows = ids[: ids.numel() // window * window].view(-1, window)
        inputs, labels = windows[:, :-1], windows[:, 1:]
        counted = [window - 1] * len(windows)
    else:
        ids = torch.cat([torch.tensor([tokenizer.eos_token_id]), ids])
        last = ids.numel() - 1 - window
        begins = [*range(0, last, window // 2), last]
        ends = [begin + window for begin in begins]
        counted = [window, *(end - before for before, end in pairwise(ends))]
        inputs = torch.stack([ids[begin : begin + window] for begin in begins])
        labels = torch.stack([ids[begin + 1 : begin + 1 + window] for begin in begins])
    total = 0.0
    with torch.inference_mode():
        for begin in range(0, len(inputs), BATCH):
            batch = slice(begin, begin + BATCH)
            logits = loaded(input_ids=inputs[batch], use_cache=False).logits
            losses = functional.cross_entropy(logits.transpose(1, 2), labels[batch], reduction="none")
            total += sum(float(row[-n:].double().sum()) for row, n in zip(losses, counted[batch], strict=True))
    return math.exp(total / sum(counted))


def ours(model: Path, text: Path, protocol: str, window: int) -> float:
    """The same by svdconvert."""
    return evaluate(model, text, protocol=protocol, window=window, batch_size=BATCH, device="cpu").perplexity


def compare(model: Path, text: Path, window: int, repeats: int) -> dict[str, dict[str, float]]:
    """Protocol -> the least CPU seconds of each side, both perplexities, and how many times as long ours takes."""
    found = {}
    for protocol in PROTOCOLS:
        sides: dict[str, Callable[[Path, Path, str, int], float]] = {"plain": plain, "ours": ours}
        spent: dict[str, list[float]] = {name: [] for name in sides}
        perplexity = {}
        for _ in range(repeats):
            for name, side in sides.items():
                begin = time.process_time()
                perplexity[name] = side(model, text, protocol, window)
                spent[name].append(time.process_time() - begin)
        least = {name: min(each) for name, each in spent.items()}
        found[protocol] = {
            "plain_s": least["plain"], "ours_s": least["ours"], "ratio": least["ours"] / least["plain"],
            "plain_perplexity": perplexity["plain"], "perplexity": perplexity["ours"],
        }  # fmt: skip
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    heads = ("protocol", "transformers, CPU s", "evaluate, CPU s", "times", "perplexity")
    rows = [
        (name, f"{one['plain_s']:.2f}", f"{one['ours_s']:.2f}", f"{one['ratio']:.2f}", f"{one['perplexity']:.4f}")
        for name, one in result["protocols"].items()
    ]
    return page(result, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("evaluating", repeats=3)
    parser.add_argument("--model", type=Path, default=BUNDLED / "model")
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--characters", type=int, default=20_000, help="of the text, from its beginning")
    parser.add_argument("--window", type=int, default=256)
    options: argparse.Namespace = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(options.text.read_text(encoding="utf-8")[: options.characters], encoding="utf-8")
        found = compare(options.model, text, options.window, options.repeats)
    result = {"machine": machine(), "window": options.window, "protocols": found}
    save(options.out, "evaluating", result, table(result))


if __name__ == "__main__":
    main()
