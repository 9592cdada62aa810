"""Answers of a finished training run: `python -m examples.dialogue.answer --config FILE --out predictions.jsonl`.

Loads what `train` left, with its adapter and as it was quantised, generates an answer to every validation sample, and
notes size, speed and memory. `--bits 4` looks at a fully trained model in 4 bits instead, `--start` at the model that
the run started from.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from examples.dialogue.commands import SETTINGS, Command
from svdconvert.errors import InputError

if TYPE_CHECKING:
    import torch

    from examples.dialogue.settings import Settings

STATISTICS = ".statistics.json"


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--config", required=True, type=click.Path(path_type=Path), help="Settings file of the run.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of predictions to write.")
@click.option("--decoding", default="{}", help='Decoding settings as JSON: {"max_new_tokens": 64}.')
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--bits", type=click.Choice(["4", "8"]), help="Load the trained model quantised.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Answer so many samples.  [default: all]")
@click.option("--weights", type=click.Choice(["float32", "bfloat16", "float16"]), help="Type of the weights in memory.")
@click.option("--start", is_flag=True, help="Ask the model that the run started from.")
@click.option("--against", type=click.Path(path_type=Path), help="Settings file of a run to measure KL from.")
def main(
    config: Path, out: Path, decoding: str, bits: str | None, weights: str | None, against: Path | None, **options: Any
) -> None:
    """Answer the validation samples of a finished run."""
    from examples.dialogue.settings import read_settings

    try:
        chosen = json.loads(decoding)
    except ValueError as error:
        raise InputError(f"--decoding is no valid JSON: {error}") from None
    reference = None if against is None else read_settings(against)
    options |= {"bits": int(bits or 0), "weights": weights or "", "against": reference}
    statistics = answer(read_settings(config), out, chosen, **options)
    click.echo(json.dumps(statistics))


def answer(
    settings: Settings,
    out: Path,
    decoding: dict[str, Any],
    batch_size: int = 8,
    bits: int = 0,
    limit: int = 0,
    start: bool = False,
    weights: str = "",
    against: Settings | None = None,
) -> dict[str, Any]:
    """Generate, and write predictions and, beside them, statistics.

    Args:
        settings: of a finished run on dialogues.
        out: JSONL file to write.
        decoding: fields of :class:`examples.dialogue.generation.Decoding`.
        batch_size: prompts at a time.
        bits: 4 or 8 to load a fully trained model quantised; 0: as it was trained.
        limit: samples to answer; 0: all of the validation data.
        start: ask the model that the run started from, before any training.
        weights: type of the weights in memory; empty: as in training.
        against: of a finished run with the same tokenizer; KL(its model || this one) is measured on the answers.

    Returns:
        loss and perplexity of the reference answers, KL, parameters, weight bytes, seconds, generated tokens and their
        rate, answers that did not end by themselves, and the peak of memory.

    Raises:
        InputError, JobError: the run is not finished, or its model cannot be loaded or asked.
    """
    import torch

    from examples.dialogue.encoding import dialogue_data
    from examples.dialogue.generation import Decoding, generate
    from examples.dialogue.memory import PeakMemory, count_memory
    from examples.dialogue.models import load_trained
    from examples.dialogue.settings import QuantizationSettings
    from examples.dialogue.templates import ELISION, cut
    from svdconvert.machine.devices import resolve_device

    if settings.data.kind != "dialogue":
        raise InputError(f"{settings.name} was trained on raw text; there is nothing to answer")
    if bits and settings.adapter.kind != "none":
        raise InputError(f"{settings.name} has an adapter; load it as it was trained, without --bits")
    try:
        chosen = Decoding(**decoding)
    except TypeError as error:
        raise InputError(f"unknown decoding setting: {error}") from None
    done = out.with_name(out.name + STATISTICS)
    if out.is_file() and done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    device = torch.device(resolve_device("auto"))
    peak = PeakMemory(device)
    quantization = QuantizationSettings(bits=bits, compute="bfloat16" if device.type == "cuda" else "float32")
    how: dict[str, Any] = {"quantization": quantization if bits else None, "weights": weights}
    model, tokenizer = load_trained(settings, device, start=start, **how)
    limit = limit or settings.data.validation_limit
    data = dialogue_data(settings.data.validation, tokenizer, settings.data, limit, settings.training.seed)
    losses = _losses(model, data.rows, device, against, weights)
    samples = [cut(sample, settings.data.passage) for sample in data.samples]
    clock = time.perf_counter()
    rows = generate(
        model,
        tokenizer,
        samples,
        out,
        template=settings.data.template,
        decoding=chosen,
        batch_size=batch_size,
        name=settings.name,
        identity=f"{settings.output} {bits}" + " start" * start,
        elision=settings.data.elision or ELISION,
        progress=True,
    )
    seconds = time.perf_counter() - clock
    tokens = sum(int(row["new_tokens"]) for row in rows)
    memory = count_memory(model)
    statistics: dict[str, Any] = {
        **losses,
        "samples": len(samples),
        "parameters": memory.parameters,
        "weights": memory.weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(seconds, 2),
        "new_tokens": tokens,
        "unfinished": sum(not row["finished"] for row in rows),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak": peak.bytes(),
        "peak_is": peak.what,
        "decoding": asdict(chosen),
        "batch_size": batch_size,
    }
    partial = done.with_name(done.name + ".writing")
    partial.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    partial.replace(done)
    return statistics


def _losses(
    model: Any, rows: Any, device: torch.device, against: Settings | None, weights: str
) -> dict[str, float | None]:
    """Loss, perplexity and KL of the right answers; the reference model is in memory no longer than that."""
    from examples.dialogue.models import load_trained
    from examples.dialogue.speech import answer_losses

    reference = None if against is None else load_trained(against, device, weights=weights)[0]
    loss, divergence = answer_losses(model, rows, device, reference)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "kl": divergence}


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.answer")
