"""Small training runs: samples in ASCII, which the tests' tokenizer knows, a settings file for them, and their end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from examples.dialogue.schema import Sample, write_jsonl
from examples.dialogue.settings import Settings, read_settings

ANSWERS = ("yes", "no", "go", "ok")


def silent(text: str) -> None:
    """Nobody listens."""


def write_samples(path: Path, count: int, name: str) -> Path:
    """Samples whose answer follows from the question, so that a model can learn something."""
    samples = [
        Sample(f"{name}{i}_1", f"{name}{i}", passage="", question=f"q{i % 4}", answer=ANSWERS[i % 4])
        for i in range(count)
    ]
    write_jsonl(path, samples)
    return path


def settings_for(folder: Path, start: Path, **sections: Any) -> Settings:
    """Write a settings file for a run on the model ``start`` into ``folder``, and read it; sections come on top."""
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    if not train.exists():
        write_samples(train, 16, "t")
        write_samples(validation, 4, "v")
    table: dict[str, Any] = {
        "name": "run",
        "output": str(folder / "out"),
        "model": {"path": str(start)},
        "data": {
            "train": str(train),
            "validation": str(validation),
            "template": "multidoc2dial-unmarked",
            "max_length": 60,
        },
        "training": {
            "batch_size": 4,
            "micro_batch": 4,
            "epochs": 2,
            "learning_rate": 1e-3,
            "autocast": "no",
            "seed": 1,
        },
        "speech": {"samples": 2, "show": 1, "new_tokens": 4},
    }
    for name, values in sections.items():
        table[name] = {**table.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "settings.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    return read_settings(path)


def die_at(step: int, output: Path) -> None:
    """Let this process be killed while it writes the first checkpoint of a run from a step on.

    All is written then but the state file, which the Trainer writes last: the checkpoint before is the last whole one.
    """
    from transformers import TrainerState

    write = TrainerState.save_to_json

    def save_to_json(self: TrainerState, path: str) -> None:
        if self.global_step >= step and Path(path).is_relative_to(output):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, path)

    TrainerState.save_to_json = save_to_json  # type: ignore[method-assign]


def killed_run(settings_file: Path, step: int, output: Path) -> None:
    """A run in this process that :func:`die_at` ends."""
    from examples.dialogue.train import train

    die_at(step, output)
    train(read_settings(settings_file), silent)
