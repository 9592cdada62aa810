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
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from examples.dialogue.commands import SETTINGS, Command
from svdconvert.errors import InputError, JobError

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from examples.dialogue.encoding import Encoded
    from examples.dialogue.schedule import Schedule
    from examples.dialogue.settings import Settings

CHECKPOINTS, SETTINGS_FILE = "checkpoints", "settings.json"
Say = Callable[[str], None]


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
    _same_as_before(folder, without_output(settings))
    if (folder / REPORT).is_file():
        found: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return found
    for needed in (settings.model.trained_by, settings.distillation.teacher_trained_by):
        if needed:
            train(read_settings(needed), say)
    say(f"== {settings.name}: {folder}")
    return _run(settings, folder, say)


def _run(settings: Settings, folder: Path, say: Say) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from examples.dialogue import models
    from examples.dialogue.encoding import calibration_text, load_data
    from examples.dialogue.memory import PeakMemory, count_memory
    from examples.dialogue.schedule import schedule
    from svdconvert.models.tokenizer import load_tokenizer

    clock = time.perf_counter()
    state = _processes(settings)
    device = state.device if state.device.type == "cuda" else torch.device("cpu")  # accelerate numbers CPUs too
    first = state.is_main_process
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / SETTINGS_FILE, models.without_output(settings))
        say("settings " + json.dumps(settings.to_json(), ensure_ascii=False))

    source = models.source_folder(settings)
    tokenizer = load_tokenizer(source)
    train_data, validation = load_data(settings.data, tokenizer, settings.training.seed)
    planned = schedule(len(train_data.rows), settings.training, state.num_processes)
    say(_data_line(train_data, validation, planned, settings))

    if first:
        text = folder / "calibration.jsonl"
        start = models.factor(
            settings, str(device), lambda: calibration_text(train_data.samples, settings.data, text), _events(say)
        )
    state.wait_for_everyone()
    if not first:
        start = models.start_in(folder / models.START if settings.convert.wanted else source, source)
    if start.factored:
        say(f"factored start in {start.folder}")

    arguments = training_arguments(settings, planned, folder, device)
    reference = _reference(settings, start, validation, device, folder) if first else None
    peak = PeakMemory(device)
    set_seed(settings.training.seed)
    model = models.load_causal(
        start.folder, device, settings.model.weights, settings.quantization, settings.model.attention
    )
    before = _listen(model, tokenizer, validation, settings, device, reference, say, "start") if first else None
    state.wait_for_everyone()
    set_seed(settings.training.seed)
    model = models.adapt(model, settings, str(start.folder))
    memory = count_memory(model, arguments.optim)
    say(
        f"parameters {memory.parameters:,}, trainable {memory.trainable:,}; weights {_size(memory.weights)}, gradients "
        f"{_size(memory.gradients)}, optimiser {_size(memory.optimizer)}; peak so far {_size(peak.bytes())} {peak.what}"
    )

    speeches: list[dict[str, Any]] = [{"step": 0} | before] if before else []
    trainer = _trainer(settings, model, tokenizer, arguments, train_data, validation, device)
    trainer.add_callback(_watcher(settings, folder, tokenizer, validation, device, reference, speeches, say, first))
    resumed = last_checkpoint(folder / CHECKPOINTS)
    if resumed:
        say(f"continuing from {resumed.name}")
    trained = time.perf_counter()
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
    seconds = time.perf_counter() - trained
    if not any("eval_loss" in entry and entry["step"] == planned.steps for entry in trainer.state.log_history):
        trainer.evaluate()
    _save(trainer, settings, folder, first)

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
        "training_seconds": round(seconds, 2),
        "resumed_at": int(resumed.name.rpartition("-")[2]) if resumed else 0,
        "processes": state.num_processes,
        "distributed": trainer.accelerator.distributed_type.value,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "eval_loss": next(e["eval_loss"] for e in reversed(trainer.state.log_history) if "eval_loss" in e),
        "history": trainer.state.log_history,
        "speech": speeches,
        "versions": _versions(),
    }
    if first:
        _write_curves(folder, settings, trainer.state.log_history)
        _write_json(folder / models.REPORT, report)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    state.wait_for_everyone()
    return report


def training_arguments(settings: Settings, planned: Schedule, folder: Path, device: torch.device) -> TrainingArguments:
    """The recipe in the Trainer's terms.

    Args:
        settings: of the run.
        planned: its steps.
        folder: of the run.
        device: this process's.

    Raises:
        InputError: the device cannot do what is asked for.
    """
    from transformers import TrainingArguments

    recipe = settings.training
    if recipe.autocast == "fp16" and device.type == "cpu":
        raise InputError("training.autocast 'fp16' needs a GPU; set it to 'bf16' or 'no'")
    optimizer = recipe.optimizer
    if optimizer == "paged":
        optimizer = "paged_adamw_32bit" if device.type == "cuda" else "adamw_torch"
    # transformers 5 renames these two; without checkpointing they need not be named at all
    checkpointing: dict[str, Any] = {}
    if recipe.gradient_checkpointing:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            max_steps=planned.steps,
            warmup_steps=planned.warmup,
            eval_strategy="steps",
            eval_steps=planned.evaluation,
            save_strategy="steps",
            save_steps=planned.evaluation,
            save_total_limit=recipe.keep_checkpoints,
            load_best_model_at_end=recipe.select == "best",
            metric_for_best_model="loss",
            logging_strategy="steps",
            logging_steps=max(planned.evaluation // 10, 1),
            per_device_train_batch_size=recipe.micro_batch,
            per_device_eval_batch_size=recipe.evaluation_batch,
            gradient_accumulation_steps=planned.accumulation,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.schedule,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip,
            adam_beta2=recipe.beta2,
            optim=optimizer,
            bf16=recipe.autocast == "bf16",
            fp16=recipe.autocast == "fp16",
            **checkpointing,
            seed=recipe.seed,
            data_seed=recipe.seed,
            use_cpu=device.type == "cpu",
            prediction_loss_only=True,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            ddp_timeout=int(recipe.timeout_hours * 3600),
            disable_tqdm=not sys.stderr.isatty(),
            report_to=[],
        )
    except ValueError as error:
        raise InputError(f"transformers refuses these training settings: {str(error).splitlines()[0]}") from None
    if arguments.n_gpu > 1:
        raise InputError(
            f"one process sees {arguments.n_gpu} GPUs; start it with `accelerate launch`, or show it one with "
            "CUDA_VISIBLE_DEVICES"
        )
    return arguments


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole; the Trainer writes its state file last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _processes(settings: Settings) -> Any:
    """This process among those of the run; it initialises them if there are several.

    Raises:
        InputError: the model is to be sharded and cannot be.
    """
    from datetime import timedelta

    import torch
    from accelerate import DistributedType, PartialState

    options: dict[str, Any] = {}
    if int(os.environ.get("LOCAL_RANK", -1)) != -1:
        options["timeout"] = timedelta(hours=settings.training.timeout_hours)
    state = PartialState(cpu=not torch.cuda.is_available(), **options)
    if _sharded() and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError("accelerate has no FSDP for CPU processes and would hold a whole model in each; take ddp.yaml")
    if _sharded() and settings.adapter.kind == "llama-adapter":
        raise InputError("a LLaMA-Adapter cannot be trained on a sharded model; take ddp.yaml")
    return state


def _sharded() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _trainer(
    settings: Settings,
    model: Any,
    tokenizer: Any,
    arguments: TrainingArguments,
    train_data: Encoded,
    validation: Encoded,
    device: torch.device,
) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": train_data.rows,
        "eval_dataset": validation.rows,
        "processing_class": tokenizer,
        "data_collator": DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    }
    if not settings.distillation.wanted:
        return _quiet(Trainer(**common))
    from examples.dialogue.distillation import DistillationTrainer
    from examples.dialogue.models import load_teacher

    return _quiet(
        DistillationTrainer(**common, teacher=load_teacher(settings, device), distillation=settings.distillation)
    )


def _quiet(trainer: Any) -> Any:
    """Without a terminal, every logged value goes to log.csv and to no other place."""
    from transformers import PrinterCallback
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        trainer.remove_callback(PrinterCallback)
        disable_progress_bar()
    return trainer


def _watcher(
    settings: Settings,
    folder: Path,
    tokenizer: Any,
    validation: Encoded,
    device: torch.device,
    reference: float | None,
    speeches: list[dict[str, Any]],
    say: Say,
    first: bool,
) -> Any:
    """After every evaluation: listen to the model, and draw the curves."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if not first:
                return
            _write_curves(folder, settings, state.log_history)
            # A model in shards can only speak with all processes together.
            if model is not None and not (args.fsdp or _sharded() or args.deepspeed):
                when = f"step {state.global_step}"
                found = _listen(model, tokenizer, validation, settings, device, reference, say, when)
                if found:
                    speeches.append({"step": state.global_step} | found)

    return Watcher()


def _listen(
    model: Any,
    tokenizer: Any,
    validation: Encoded,
    settings: Settings,
    device: torch.device,
    reference: float | None,
    say: Say,
    when: str,
) -> dict[str, Any] | None:
    from examples.dialogue.speech import listen

    if not settings.speech.samples:
        return None
    speech = listen(model, tokenizer, validation.rows, settings.speech, device, reference)
    before = f" (before factoring {speech.reference_perplexity:,.2f})" if speech.reference_perplexity else ""
    say(
        f"{when}: perplexity {speech.perplexity:,.2f}{before}, repetition {speech.repetition:.0%}, empty answers "
        f"{speech.empty:.0%}"
    )
    for prompt, answer in speech.answers:
        say(f"  ...{prompt[-60:]!r} -> {answer!r}")
    for warning in speech.warnings:
        say(f"WARNING: {settings.name} may no longer speak: {warning}")
    return speech.to_json()


def _reference(settings: Settings, start: Any, validation: Encoded, device: torch.device, folder: Path) -> float | None:
    """Perplexity of the model that was factored, on the rows that the check listens to; kept in a file."""
    from examples.dialogue.models import load_causal
    from examples.dialogue.speech import answer_perplexity

    if not start.factored or start.source == start.folder or not settings.speech.samples:
        return None
    kept = folder / "reference.json"
    if kept.is_file():
        return float(json.loads(kept.read_text(encoding="utf-8"))["perplexity"])
    dense = load_causal(start.source, device, settings.model.weights)
    found = answer_perplexity(dense, validation.rows[: settings.speech.samples], device)
    _write_json(kept, {"perplexity": found})
    return found


def _save(trainer: Any, settings: Settings, folder: Path, first: bool) -> None:
    """The result under its final name, once it is whole."""
    from examples.dialogue.models import ADAPTER, MODEL

    full = settings.adapter.kind == "none"
    final, partial = folder / (MODEL if full else ADAPTER), folder / "result.writing"
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        kind = type(trainer.model)
        if kind.__module__.startswith("torch."):  # FSDP2's own; its files would be saved as the model's code
            kind._auto_class = None
    if settings.adapter.kind == "llama-adapter":
        if first:
            trainer.accelerator.unwrap_model(trainer.model).save_adapter(partial)
    else:
        trainer.save_model(str(partial))
    if first:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to who loads the model
        partial.rename(final)


def _same_as_before(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        InputError: a setting has changed; the message names it.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged; delete {folder} or give another --output") from None
    for section, values in wanted.items():
        old = before.get(section, {})
        for key, value in values.items():
            if old.get(key) != value:
                raise InputError(
                    f"{folder} holds a run with {section}.{key} = {old.get(key)!r}, not {value!r}; delete the folder "
                    "or give another --output"
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


def _write_json(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + ".writing")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


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
