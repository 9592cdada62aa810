"""`accelerate launch` with the example's own files: two processes, DDP or FSDP, end where one process ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import settings_for, silent

from examples.dialogue import models
from examples.dialogue.run_files import last_checkpoint
from examples.dialogue.train import train

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "dialogue" / "settings"
LORA = {"kind": "lora", "rank": 4, "dropout": 0.0}  # every process draws its own dropout
KINDS = {
    "dense": {},
    "S": {"convert": {"rank": 16}},
    "S-L": {"convert": {"rank": 16}, "adapter": LORA},
    "S-A": {"convert": {"rank": 16}, "adapter": {"kind": "llama-adapter", "length": 4, "layers": 2}},
    "distillation": {"convert": {"rank": 16}, "distillation": {"teacher_weights": "float32"}},
}


def launch(way: str, settings_file: Path, die_at: int = 0) -> subprocess.CompletedProcess[str]:
    """The command of the example's page, but for a free port; FSDP by way of :mod:`support.launched`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--config_file", str(FILES / f"{way}.yaml"), "--main_process_port", str(port)]
    words += ["-m", "support.launched", "--config", str(settings_file)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "DIE_AT": str(die_at)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "kind"),
    [("ddp", "S-L"), ("ddp", "S-A"), ("ddp", "distillation"), ("fsdp", "dense"), ("fsdp", "S"), ("fsdp", "S-L")],
)
def test_two_processes_end_where_one_does(way, kind, dense, tmp_path):
    """Killed on the way and launched again, the same losses but for rounding, and a result that loads as any other."""
    options = {**KINDS[kind], "training": {"micro_batch": 2}, "speech": {"samples": 0}}
    if kind == "distillation":
        options["distillation"] = {"teacher": str(dense), **options["distillation"]}
    alone = settings_for(tmp_path / "one", dense, **options)
    expected = train(alone, silent)
    settings = settings_for(tmp_path / "two", dense, **options)
    folder = Path(settings.output)
    killed = launch(way, tmp_path / "two" / "settings.json", die_at=6)
    assert killed.returncode != 0
    assert last_checkpoint(folder / "checkpoints").name == "checkpoint-4", killed.stderr[-3000:]
    done = launch(way, tmp_path / "two" / "settings.json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((folder / "report.json").read_text())
    assert (report["processes"], report["resumed_at"], report["steps"]) == (2, 4, expected["steps"])
    assert report["distributed"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[way]
    assert losses(report) == pytest.approx(losses(expected), rel=1e-4)
    name = "model" if settings.adapter.kind == "none" else "adapter"
    one, two = (Path(run.output) / name for run in (alone, settings))
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())
    for file in one.glob("*.safetensors"):
        before, after = load_file(file), load_file(two / file.name)
        assert before.keys() == after.keys()
        assert all((before[key] - after[key]).abs().max() < 1e-3 for key in before)
    models.load_trained(settings, torch.device("cpu"))


def losses(report) -> list[float]:
    return [entry["eval_loss"] for entry in report["history"] if "eval_loss" in entry]


@pytest.mark.slow
def test_a_llama_adapter_is_not_sharded(dense, tmp_path):
    settings_for(tmp_path, dense, **KINDS["S-A"])
    refused = launch("fsdp", tmp_path / "settings.json")
    assert refused.returncode == 1
    assert "Error: a LLaMA-Adapter cannot be trained on a sharded model; take ddp.yaml" in refused.stderr
