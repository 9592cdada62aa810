"""transformers' Trainer for a run: its arguments, its processes, and the result that it leaves."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.dialogue.run_files import CHECKPOINTS
from svdconvert.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from examples.dialogue.encoding import Encoded
    from examples.dialogue.schedule import Schedule
    from examples.dialogue.settings import Settings


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


def join_processes(settings: Settings) -> Any:
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
    if is_sharded() and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError("accelerate has no FSDP for CPU processes and would hold a whole model in each; take ddp.yaml")
    if is_sharded() and settings.adapter.kind == "llama-adapter":
        raise InputError("a LLaMA-Adapter cannot be trained on a sharded model; take ddp.yaml")
    return state


def is_sharded() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def make_trainer(
    settings: Settings,
    model: Any,
    tokenizer: Any,
    arguments: TrainingArguments,
    train_data: Encoded,
    validation: Encoded,
    device: torch.device,
) -> Any:
    """A Trainer, of a teacher's pupil where there is one."""
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


def save_result(trainer: Any, settings: Settings, folder: Path, first: bool) -> None:
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
