"""Convert the bundled model, load the result as anybody would, and compare: `make demo`.

The bundled model is tiny (4 million parameters); what counts here is that every step is the real one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from svdconvert import convert, evaluate
from svdconvert.cli.progress import TerminalEvents

HERE = Path(__file__).parent
PROMPT = "이 영화는"


def generate(folder: Path, tokens: int = 32) -> str:
    """Continue the prompt with sampling from a fixed seed."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, top_p=0.8, temperature=0.7, pad_token_id=2)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=72, help="rank of every linear layer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "out" / "tiny_polyglot")
    options = parser.parse_args()
    dense, folder = HERE / "model", options.out / f"r{options.rank}"

    disable_progress_bar()
    # Without a terminal nobody wraps lines: give tables the room they need.
    console = Console(width=None if sys.stdout.isatty() else 120)
    with TerminalEvents(console) as events:
        report = convert(dense, folder, rank=options.rank, device="cpu", overwrite=True, events=events)

    table = Table("", "parameters", "perplexity", "bits per character")
    for name, path in (("dense", dense), (f"rank {options.rank}", report.folder)):
        result = evaluate(path, HERE / "heldout.txt", window=256, stride=128, device="cpu")
        cells = (f"{result.parameters:,}", f"{result.perplexity:.2f}", f"{result.bits_per_character:.4f}")
        table.add_row(name, *cells)
    console.print(table)
    for name, path in (("dense", dense), ("factored", report.folder)):
        console.print(f"[bold]{name}:[/] {generate(path)}", soft_wrap=True, highlight=False)
    console.print(f"\nThe factored model is in {report.folder}")


if __name__ == "__main__":
    main()
