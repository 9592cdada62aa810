"""Answers of a checkpoint to prepared samples: `python -m examples.dialogue.generate MODEL --data FILE --out FILE`."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from examples.dialogue.commands import SETTINGS, Command
from examples.dialogue.generation import Decoding
from examples.dialogue.templates import TEMPLATES
from svdconvert.errors import InputError

_PATH = click.Path(path_type=Path)


def load_for_generation(folder: Path, device: str, dtype: str, adapter: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a dense or factored checkpoint, with a peft adapter on top if one is given.

    Args:
        folder: the checkpoint; code in it is not run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        adapter: folder that peft's save_pretrained wrote.

    Raises:
        InputError: one of the two folders cannot be loaded.
    """
    import torch

    from svdconvert.machine.devices import resolve_device
    from svdconvert.models.loading import load_model
    from svdconvert.models.tokenizer import load_tokenizer

    model: Any = load_model(folder, resolve_device(device), getattr(torch, dtype))
    if adapter is not None:
        from peft import PeftModel

        if not (adapter / "adapter_config.json").is_file():
            raise InputError(f"{adapter} has no adapter_config.json, so it is no adapter")
        try:
            model = PeftModel.from_pretrained(model, adapter).eval()
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise InputError(f"{adapter} does not fit {folder}: {str(error).strip().splitlines()[0]}") from None
    return model, load_tokenizer(folder)


def identity_of(*folders: Path) -> str:
    """Digest of a checkpoint's files by name, size and time; tells two states of one folder apart."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".bin") or file.name in ("config.json", "adapter_config.json"):
                state = file.stat()
                digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("model", type=_PATH)
@click.option("--data", type=_PATH, required=True, help="Samples, as `prepare` writes them.")
@click.option("--out", type=_PATH, required=True, help="Predictions to write (.jsonl).")
@click.option("--adapter", type=_PATH, help="A peft adapter on top of the model.")
@click.option("--template", type=click.Choice(list(TEMPLATES)), default="kodoc2dial", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first samples.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--num-beams", type=click.IntRange(1), default=1, show_default=True)
@click.option("--sample", "do_sample", is_flag=True, help="Draw tokens instead of taking the most likely one.")
@click.option("--temperature", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--no-repeat-ngram-size", type=click.IntRange(0), default=0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace predictions that were made with other settings.")
def main(
    model: Path, data: Path, out: Path, adapter: Path | None, limit: int | None, device: str, dtype: str,
    **options: Any,
) -> None:  # fmt: skip
    """Let MODEL, a dense or a factored checkpoint, answer the questions of DATA.

    The file's first line states all settings. After an interruption the same command goes on where it stopped.
    """
    from examples.dialogue.generation import generate
    from examples.dialogue.schema import read_jsonl

    for folder in (model, adapter):
        if folder is not None and not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
    samples, report = read_jsonl(data)
    if report.dropped:
        click.echo(str(report), err=True)
    decoding = Decoding(**{field.name: options.pop(field.name) for field in fields(Decoding)})
    network, tokenizer = load_for_generation(model, device, dtype, adapter)
    rows = generate(
        network,
        tokenizer,
        samples[:limit],
        out,
        decoding=decoding,
        name=model.resolve().name if adapter is None else f"{model.resolve().name} + {adapter.resolve().name}",
        identity=identity_of(*(folder for folder in (model, adapter) if folder is not None)),
        progress=True,
        **options,
    )
    ended = sum(bool(row.get("finished")) for row in rows)
    click.echo(f"{out}: {len(rows):,} answers, {ended:,} of them ended by the model itself")


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.generate")
