"""Answers of a finished training run: `python -m examples.dialogue.answer --config FILE --out predictions.jsonl`.

Loads what `train` left, with its adapter and as it was quantised, generates an answer to every validation sample, and
notes size, speed and memory. `--bits 4` looks at a fully trained model in 4 bits instead.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from examples.dialogue.commands import SETTINGS, Command
from svdconvert.errors import InputError

STATISTICS = ".statistics.json"


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--config", required=True, type=click.Path(path_type=Path), help="Settings file of the run.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of predictions to write.")
@click.option("--decoding", default="{}", help='Decoding settings as JSON: {"max_new_tokens": 64}.')
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--bits", type=click.Choice(["4", "8"]), help="Load the trained model quantised.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Answer so many samples.  [default: all]")
def main(config: Path, out: Path, decoding: str, batch_size: int, bits: str | None, limit: int) -> None:
    """Answer the validation samples of a finished run."""
    from examples.dialogue.settings import read_settings

    try:
        chosen = json.loads(decoding)
    except ValueError as error:
        raise InputError(f"--decoding is no valid JSON: {error}") from None
    statistics = answer(read_settings(config), out, chosen, batch_size, int(bits or 0), limit)
    click.echo(json.dumps(statistics))


def answer(
    settings: Any, out: Path, decoding: dict[str, Any], batch_size: int = 8, bits: int = 0, limit: int = 0
) -> dict[str, Any]:
    """Generate, and write predictions and, beside them, statistics.

    Args:
        settings: of a finished run on dialogues.
        out: JSONL file to write.
        decoding: fields of :class:`examples.dialogue.generation.Decoding`.
        batch_size: prompts at a time.
        bits: 4 or 8 to load a fully trained model quantised; 0: as it was trained.
        limit: samples to answer; 0: all of the validation data.

    Returns:
        loss and perplexity of the reference answers, parameters, weight bytes, seconds, generated tokens and their
        rate, and the peak of memory.

    Raises:
        InputError, JobError: the run is not finished, or its model cannot be loaded or asked.
    """
    import torch

    from examples.dialogue.encoding import dialogue_data
    from examples.dialogue.generation import Decoding, generate
    from examples.dialogue.memory import PeakMemory, count_memory
    from examples.dialogue.models import load_trained
    from examples.dialogue.settings import QuantizationSettings
    from examples.dialogue.speech import answer_perplexity
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
    model, tokenizer = load_trained(settings, device, quantization if bits else None)
    limit = limit or settings.data.validation_limit
    data = dialogue_data(settings.data.validation, tokenizer, settings.data, limit, settings.training.seed)
    perplexity = answer_perplexity(model, data.rows, device)
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
        identity=f"{settings.output} {bits}",
        elision=settings.data.elision or ELISION,
        progress=True,
    )
    seconds = time.perf_counter() - clock
    tokens = sum(int(row["new_tokens"]) for row in rows)
    memory = count_memory(model)
    statistics = {
        "perplexity": perplexity,
        "samples": len(samples),
        "parameters": memory.parameters,
        "weights": memory.weights,
        "seconds": round(seconds, 2),
        "new_tokens": tokens,
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


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.answer")
