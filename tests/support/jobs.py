"""Every kind of job on the tiniest models, and what two runs of one must have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.checkpoints import content, random_tensors, write_checkpoint
from svdconvert import convert
from svdconvert.jobs.output import JOB_FOLDER


def first_blocks(count: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The random tensors of a model of so many blocks."""
    kept = [f".layers.{layer}." for layer in range(count)]
    tensors = random_tensors(seed=seed)
    return {n: t for n, t in tensors.items() if ".layers." not in n or any(part in n for part in kept)}


def write_inputs(folder: Path) -> Path:
    """Models of one and two blocks, one as .bin, a factored one, an adapter and texts."""
    write_checkpoint(folder / "one", first_blocks(1), shards=2, config={"num_hidden_layers": 1})
    write_checkpoint(folder / "two", first_blocks(2), config={"num_hidden_layers": 2})
    (folder / "two" / "generation_config.json").unlink()
    write_checkpoint(folder / "bin", first_blocks(1), shards=2, pickled=True, config={"num_hidden_layers": 1})
    convert(folder / "one", folder / "factored", rank=16, device="cpu", check=False)
    words = ["호랑이", "tiger", "옛날", "mountain", "살았다", "0123"]
    text = "\n\n".join(" ".join(words[(7 * i + 3 * j * j) % 6] for j in range(12)) for i in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "heldout.txt").write_text(text[:200], encoding="utf-8")
    generator = torch.Generator().manual_seed(1)
    layer = "base_model.model.gpt_neox.layers.0.attention.dense"
    shapes = {"A": (4, 64), "B": (64, 4)}
    pair = {f"{layer}.lora_{half}.weight": torch.randn(*shape, generator=generator) for half, shape in shapes.items()}
    (folder / "adapter").mkdir()
    save_file(pair, folder / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["dense"], "bias": "none"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def commands(inputs: Path) -> dict[str, list[object]]:
    """The jobs' words, by name; the folder that a job writes comes behind them."""
    checked = ["--max-shard-size", "60KB", "--device", "cpu", "--out"]
    small = ["--no-check", *checked]
    text = ["--calib", inputs / "text.txt", "--calib-samples", 4, "--calib-length", 16, "--calib-batch-size", 4]
    pivoted = ["--layout", "pivoted"]
    return {
        "plain": [inputs / "one", "--rank", 16, *small],
        "bin": [inputs / "bin", "--rank", 16, *small],
        "split": [inputs / "one", "--rank", 16, "--split-fused", *pivoted, *small],
        "kfac, refit": [inputs / "one", "--keep", 0.4, *text, *pivoted, "--refit", "sequential", *small],
        "shared": [inputs / "two", "--rank", 16, "--share-layers", 2, "--method", "whiten", *text, *small],
        "densify": ["densify", inputs / "factored", *checked],
        "fold": ["fold", inputs / "factored", "--adapter", inputs / "adapter", *checked],
        "heal": [
            *("heal", inputs / "factored", "--against", inputs / "one", *text, "--steps", 3, "--batch-size", 2),
            *("--lr", 1e-3, "--precision", "float32", *small),
        ],
        "convert and heal": [
            *(inputs / "one", "--rank", 16, "--method", "svd", *text, "--heal", "--heal-epochs", 0.5, *small),
        ],
        "calibrate": ["calibrate", inputs / "one", *text, "--device", "cpu", "--out"],
        "sweep": [
            *("sweep", inputs / "one", "--text", inputs / "heldout.txt", "--rank", 8, "--rank", 16, "--method", "svd"),
            *("--no-plot", "--keep-models", "--device", "cpu", "--out"),
        ],
    }


def result(folder: Path) -> dict[str, Any]:
    """What must be equal: all files but the times in them and what a job leaves for its next run."""
    return {
        str(path.relative_to(folder)): _timeless(json.loads(path.read_text()))
        if path.name == "sweep.json"
        else content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and JOB_FOLDER not in path.relative_to(folder).parts
    }


def _timeless(value: Any) -> Any:
    """JSON without what is measured by the clock."""
    if isinstance(value, dict):
        return {key: _timeless(v) for key, v in value.items() if key not in ("seconds", "timing")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value
