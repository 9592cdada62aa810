"""Train one setting: `python -m examples.dialogue.train --config FILE`, also under `accelerate launch`.

Factors the start model if the settings say so, puts the adapter on it, and hands the rest to transformers' Trainer. The
same command again continues after a kill, and is done at once when the result is there. A run's folder holds

    settings.json   what was asked for            checkpoints/  the Trainer's, while it runs
    start/          the factored start model      model/ or adapter/  the result
    report.json     written last                  log.csv, loss.png   every logged value, and the curves
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from examples.dialogue.commands import SETTINGS, Command
from examples.dialogue.listener import Listener, Say, reference_perplexity
from examples.dialogue.run_files import CHECKPOINTS, SETTINGS_FILE, last_checkpoint, refuse_other_settings, write_json
from examples.dialogue.trainer import join_processes, make_trainer, save_result, training_arguments
from svdconvert.errors import InputError, JobError

if TYPE_CHECKING:
    import torch

    from examples.dialogue.encoding import Encoded
    from examples.dialogue.memory import Memory, PeakMemory
    from examples.dialogue.models import Start
    from examples.dialogue.schedule import Schedule
    from examples.dialogue.settings import Settings


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--config", required=True, type=click.Path(path_type=Path), help="Settings file (TOML).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write, in place of the file's.")
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="A setting, as training.seed=1 (repeatable)."
)
@click.option("--show", is_flag=True, help="Print the settings and stop.")
def main(config: Path, output: Path | None, changes: tuple[str, ...], show: bool) -> None:
    """Train what a settings file describes."""
    from examples.dialogue.settings import read_settings

    overrides = parse_changes(changes)
    if output:
        overrides["output"] = str(output)
    settings = read_settings(config, overrides)
    if show:
        click.echo(json.dumps(settings.to_json(), ensure_ascii=False, indent=2))
        return
    report = train(settings, _say)
    if _is_main():
        click.echo(
            f"{settings.name}: finished, {settings.output}/report.json, evaluation loss {report['eval_loss']:.4f}"
        )


def parse_changes(changes: tuple[str, ...]) -> dict[str, Any]:
    """``section.key=value`` words as a table; values are TOML, or text where they are none.

    Raises:
        InputError: a word has no = sign.
    """
    from examples.dialogue.settings import parse_value

    table: dict[str, Any] = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"--set {change} must be KEY=VALUE, as training.seed=1")
        value = parse_value(text)
        section, dot, name = key.rpartition(".")
        if dot:
            table.setdefault(section, {})[name] = value
        else:
            table[name] = value
    return table


def train(settings: Settings, say: Say) -> dict[str, Any]:
    """Do a run, or what is left of it, and those it starts from.

    Args:
        settings: of the run.
        say: told about progress, on the first process only.

    Returns:
        The content of report.json.

    Raises:
        InputError: it cannot be done.
        JobError: it broke off; the same call continues it.
    """
    from examples.dialogue.models import REPORT, without_output
    from examples.dialogue.settings import read_settings

    folder = Path(settings.output)
    refuse_other_settings(folder, without_output(settings))
    if (folder / REPORT).is_file():
        found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return found
    for needed in (settings.model.trained_by, settings.distillation.teacher_trained_by):
        if needed:
            train(read_settings(needed), say)
    say(f"== {settings.name}: {folder}")
    return _run(settings, folder, say)


def _run(settings: Settings, folder: Path, say: Say) -> dict[str, Any]:
    """Factor, adapt, train and save, or what is left of it."""
    import torch
    from transformers import set_seed

    from examples.dialogue import models
    from examples.dialogue.encoding import load_data
    from examples.dialogue.memory import PeakMemory, count_memory
    from examples.dialogue.schedule import schedule
    from svdconvert.models.tokenizer import load_tokenizer

    clock = time.perf_counter()
    state = join_processes(settings)
    device = state.device if state.device.type == "cuda" else torch.device("cpu")  # accelerate numbers CPUs too
    first = state.is_main_process
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, models.without_output(settings))
        say("settings " + json.dumps(settings.to_json(), ensure_ascii=False))

    tokenizer = load_tokenizer(models.source_folder(settings))
    train_data, validation = load_data(settings.data, tokenizer, settings.training.seed)
    planned = schedule(len(train_data.rows), settings.training, state.num_processes)
    say(_data_line(train_data, validation, planned, settings))
    start = _start(settings, folder, train_data, state, device, say)

    arguments = training_arguments(settings, planned, folder, device)
    reference = reference_perplexity(settings, start, validation, device, folder) if first else None
    listener = Listener(settings, tokenizer, validation, device, reference, say)
    peak = PeakMemory(device)
    set_seed(settings.training.seed)
    model = models.load_causal(
        start.folder, device, settings.model.weights, settings.quantization, settings.model.attention
    )
    if first:
        listener.listen(model, 0)
    state.wait_for_everyone()
    set_seed(settings.training.seed)
    model = models.adapt(model, settings, str(start.folder))
    memory = count_memory(model, arguments.optim)
    say(_memory_line(memory, peak))

    trainer = make_trainer(settings, model, tokenizer, arguments, train_data, validation, device)
    if first:
        trainer.add_callback(listener.callback(folder))
    training = _train_model(trainer, folder, planned, say)
    save_result(trainer, settings, folder, first)

    report = {
        "name": settings.name,
        "settings": settings.to_json(),
        "start": str(start.folder),
        "source": str(start.source),
        "rows": len(train_data.rows),
        "tokens": train_data.tokens,
        "dropped": dict(train_data.dropped),
        "steps": planned.steps,
        "warmup": planned.warmup,
        "evaluation_every": planned.evaluation,
        "memory": memory.to_json() | {"peak": peak.bytes(), "peak_is": peak.what},
        "seconds": round(time.perf_counter() - clock, 2),
        **training,
        "processes": state.num_processes,
        "distributed": trainer.accelerator.distributed_type.value,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "eval_loss": next(e["eval_loss"] for e in reversed(trainer.state.log_history) if "eval_loss" in e),
        "history": trainer.state.log_history,
        "speech": listener.speeches,
        "versions": _versions(),
    }
    if first:
        _write_curves(folder, settings, trainer.state.log_history)
        write_json(folder / models.REPORT, report)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    state.wait_for_everyone()
    return report


def _start(settings: Settings, folder: Path, train_data: Encoded, state: Any, device: torch.device, say: Say) -> Start:
    """The model that the training starts from; the first process factors it, if the settings say so."""
    from examples.dialogue import models
    from examples.dialogue.encoding import calibration_text

    if state.is_main_process:
        text = folder / "calibration.jsonl"
        start = models.factor(
            settings, str(device), lambda: calibration_text(train_data.samples, settings.data, text), _events(say)
        )
    state.wait_for_everyone()
    if not state.is_main_process:
        source = models.source_folder(settings)
        start = models.start_in(folder / models.START if settings.convert.wanted else source, source)
    if start.factored:
        say(f"factored start in {start.folder}")
    return start


def _train_model(trainer: Any, folder: Path, planned: Schedule, say: Say) -> dict[str, Any]:
    """Train, from the last checkpoint on, and evaluate the end.

    Returns:
        ``training_seconds`` and ``resumed_at``, the step that it went on from.

    Raises:
        JobError: the device has too little memory.
    """
    import torch

    resumed = last_checkpoint(folder / CHECKPOINTS)
    if resumed:
        say(f"continuing from {resumed.name}")
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            # torch says it of every CPU run
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except torch.OutOfMemoryError:
        raise JobError(
            "out of memory on the device; lower training.micro_batch or set training.gradient_checkpointing, and give "
            "another --output"
        ) from None
    seconds = time.perf_counter() - begin
    if not any("eval_loss" in entry and entry["step"] == planned.steps for entry in trainer.state.log_history):
        trainer.evaluate()
    step = int(resumed.name.rpartition("-")[2]) if resumed else 0
    return {"training_seconds": round(seconds, 2), "resumed_at": step}


def _memory_line(memory: Memory, peak: PeakMemory) -> str:
    return (
        f"parameters {memory.parameters:,}, trainable {memory.trainable:,}; weights {_size(memory.weights)}, gradients "
        f"{_size(memory.gradients)}, optimiser {_size(memory.optimizer)}; peak so far {_size(peak.bytes())} {peak.what}"
    )


def _events(say: Say) -> Any:
    from svdconvert import Events

    class Notes(Events):
        def note(self, text: str) -> None:
            say(f"  {text}")

        def shard(self, name: str, size: int) -> None:
            say(f"  wrote {name}, {_size(size)}")

    return Notes()


def _write_curves(folder: Path, settings: Settings, history: list[dict[str, Any]]) -> None:
    from examples.dialogue.curves import write_curves

    write_curves(history, settings.name, folder)


def _data_line(train: Encoded, validation: Encoded, planned: Schedule, settings: Settings) -> str:
    dropped = "".join(f", dropped {count:,} {why}" for why, count in train.dropped.items())
    return (
        f"{len(train.rows):,} training rows ({train.tokens:,} tokens, {train.counted:,} in the loss{dropped}), "
        f"{len(validation.rows):,} validation rows; {planned.steps} steps, warm-up {planned.warmup}, evaluation every "
        f"{planned.evaluation}, batch {settings.training.batch_size} in {planned.accumulation} micro-batches"
    )


def _size(count: int) -> str:
    from svdconvert.words import size

    return size(count)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("svdconvert", "torch", "transformers", "peft", "accelerate", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _is_main():
        click.echo(text)


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.train")
