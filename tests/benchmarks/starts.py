"""What a start is worth once it has been trained: several ways to compress, each healed and then fine-tuned alike.

    python -m tests.benchmarks.starts --keep 0.6 0.4
    python -m tests.benchmarks.starts --keep 0.6 --tune dialogues.txt --tune-test other-dialogues.txt

By default on the bundled model. Every way is calibrated and healed on the same sequences, and judged by the mean
KL(dense || model) on text that neither has seen, before and after. With ``--tune`` both are then fine-tuned whole to
the next tokens of another text by a plain loop, and judged by their cross-entropy on a third one. Writes JSON and
Markdown.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdconvert import Calibration, convert, evaluate, heal

from .harness import add_bundled, new_parser, page
from .measure import machine, markdown_table, save
from .quality import Row

WAYS = (
    Row("svd, uniform", "svd", "uniform"),
    Row("whiten, uniform (SVD-LLM)", "whiten", "uniform"),
    Row("kfac, global", "kfac", "global"),
    Row("kfac, global, pivoted", "kfac", "global", "pivoted"),
    Row("kfac, measured, pivoted", "kfac", "measured", "pivoted"),
)
STAGES = ("before", "healed")


def batches(tokenizer: Any, file: Path, length: int) -> Iterator[Any]:
    """A text's tokens in rows of so many, int64 [8, length], again and again; what is left at its end is dropped."""
    import torch

    ids = tokenizer(file.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from (rows[part] for part in torch.randperm(len(rows), generator=generator).split(8))


def tune(folder: Path, options: argparse.Namespace, out: Path) -> None:
    """Train all weights to the text's next tokens, in float32, and save the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.tune_lr, weight_decay=0.0)
    for _, ids in zip(range(options.tune_steps), batches(tokenizer, options.tune, options.length), strict=False):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """A line for every way at every size."""
    text = Calibration(options.calib, samples=options.samples, length=options.length)
    for row in WAYS:
        for keep in options.keep:
            before, after = scratch / "before", scratch / "healed"
            read = {} if row.method == "svd" else {"calibration": text}
            how = {"method": row.method, "allocation": row.allocation, "layout": row.layout, **read}
            work = scratch / row.method
            convert(options.model, before, keep=keep, **how, work=work, device="cpu", check=False)
            healed = heal(before, options.model, text, after, epochs=options.epochs, device="cpu", check=False)
            found = {"way": row.name, "keep": keep, "lr": healed.record["healing"]["lr"]}
            for stage, folder in zip(STAGES, (before, after), strict=True):
                end = evaluate(
                    folder,
                    options.text,
                    window=options.length,
                    protocol="disjoint",
                    against=options.model,
                    device="cpu",
                ).divergence
                assert end is not None
                found[stage] = {"kl": end.kl, "added": end.added}
                if options.tune:
                    tune(folder, options, scratch / "tuned")
                    tuned = evaluate(
                        scratch / "tuned", options.tune_test, window=options.length, protocol="disjoint", device="cpu"
                    )
                    found[stage]["tuned"] = math.log(tuned.perplexity)
                    shutil.rmtree(scratch / "tuned")
            for folder in (before, after):
                shutil.rmtree(folder)
            print(found, flush=True)
            yield found


def markdown(result: dict[str, Any]) -> str:
    """A table: KL and added log-perplexity before and after, and the cross-entropy that fine-tuning comes to."""
    heads = ["start", "kept", "KL", "healed", "added", "healed", "learning rate"]
    tuned = "tuned" in result["lines"][0]["before"]
    rows = []
    for line in result["lines"]:
        ends = [line[stage] for stage in STAGES]
        cells = [f"{end['kl']:.4f}" for end in ends] + [f"{end['added']:+.4f}" for end in ends]
        rows.append([line["way"], f"{line['keep']:.0%}", *cells, f"{line['lr']:g}" if line["lr"] else ""])
        if tuned:
            rows[-1] += [f"{end['tuned']:.4f}" for end in ends]
    heads += ["fine-tuned", "healed, then fine-tuned"] if tuned else []
    title = (
        f"{result['model']}; calibrated and healed on {result['samples']} sequences of {result['length']} tokens, "
        f"{result['epochs']:g} times" + (f"; fine-tuned in {result['tune_steps']} steps" if tuned else "")
    )
    return page(result, title, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("starts", scratch=True)
    add_bundled(parser)
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate and heal on")
    parser.add_argument("--length", type=int, default=256, help="tokens in each, and in a window")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--tune", type=Path, help="text to fine-tune on")
    parser.add_argument("--tune-test", type=Path, help="text that this is judged on")
    parser.add_argument("--tune-steps", type=int, default=30, help="of 8 sequences")
    parser.add_argument("--tune-lr", type=float, default=1e-4)
    options = parser.parse_args()
    if (options.tune is None) != (options.tune_test is None):
        parser.error("--tune and --tune-test go together")
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        lines = list(measure(options, Path(temporary)))
    settings = {name: getattr(options, name) for name in ("samples", "length", "epochs", "tune_steps", "tune_lr")}
    result = {"machine": machine(), "model": options.model.name, **settings, "lines": lines}
    save(options.out, "starts", result, markdown(result))


if __name__ == "__main__":
    main()
