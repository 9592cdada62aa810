"""What the fuzzer damages: models in several forms, and everything that commands leave and read again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import pickle_weights, write_checkpoint
from support.families import write_family
from support.gguf_files import tiny, write_gguf

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DEVICE = ("--device", "cpu")
CONVERT = ("convert", "m", "--rank", "8", "--out", "out", *DEVICE)
CALIBRATION = ("--calib", "text.txt", "--calib-samples", "4", "--calib-length", "16")
EVALUATE = ("--text", "text.txt", "--window", "16", *DEVICE)
SWEEP = ("sweep", "m", "--keep", "0.5", "--out", "out", "--no-plot", *EVALUATE)

MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Mostly damage to the weights' files: they have the most structure.
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


# Runs a command line in a folder, to be ended after so many steps; it must succeed.
Run = Callable[[Sequence[str], Path, int | None], None]


@dataclass(frozen=True)
class Target:
    """Files that are damaged, and a command that reads them.

    Attributes:
        base: folder of :func:`make_bases`.
        files: patterns, relative to the base; one of the files is damaged.
        command: its arguments, to be run in a copy of the base.
        result: folder that it writes, or None.
        oracle: what a result must be if the command ends well: ``same`` as the undisturbed one, ``source``, what the
            damaged source says, ``adapter``, what the damaged adapter says, ``factors``, what the damaged factors say,
            ``kept``, but for the damaged file as it was, or ``said``, what the damaged file says.
    """

    base: str
    files: tuple[str, ...]
    command: tuple[str, ...]
    result: str | None = None
    oracle: str = "said"


def _targets() -> list[Target]:
    found = []
    for base in DENSE:
        model = (*(f"m/{name}" for name in MODEL), *(f"m/{name}" for name in WEIGHTS * 2))
        found += [
            Target(base, model, CONVERT, "out", "source"),
            Target(base, (model[0], *model[len(MODEL) :]), ("plan", "m", "--rank", "8")),
            Target(base, model, ("evaluate", "m", *EVALUATE)),
        ]
    for base in FACTORED:
        model = (*(f"f/{name}" for name in MODEL), *(f"f/{name}" for name in WEIGHTS * 2), "f/svdconvert.json")
        found += [
            Target(base, model, ("verify", "f")),
            Target(base, (*model, "f/svdconvert.json"), ("verify", "f", "--against", "m")),
            Target(base, model, ("densify", "f", "--out", "out", *DEVICE), "out", "factors"),
            Target(base, model, ("evaluate", "f", *EVALUATE)),
            Target(base, ("a/*", "a/*", "f/config.json"), FOLD, "out", "adapter"),
        ]
    found += [
        Target("job", ("out/.svdconvert/journal*", "out/.svdconvert/job.json"), CONVERT, "out", "same"),
        Target("done", ("out/svdconvert.json", "out/config.json"), CONVERT, "out", "kept"),
        Target("stats", ("stats/*",), STATS, "out", "same"),
        Target("stats", ("stats/*",), CALIBRATE, "stats", "kept"),
        Target("neox", ("m/config.json", "m/tokenizer*"), CALIBRATE, "stats"),
        Target("work", ("work/**/*",), WORK, "out", "same"),
        Target("sweep", ("out/sweep.json",), SWEEP),
        Target("gguf", ("m.gguf",), ("plan", "m.gguf", "--rank", "8")),
        Target("gguf", ("m.gguf",), ("convert", "m.gguf", *CONVERT[2:]), "out"),
    ]
    return found


DENSE = ("neox", "llama", "shards", "pickle", "pickles")
FACTORED = ("factored", "factored-llama")
FOLD = ("fold", "f", "--adapter", "a", "--out", "out", *DEVICE)
STATS = (*CONVERT, "--method", "kfac", "--stats", "stats")
CALIBRATE = ("calibrate", "m", "--out", "stats", *CALIBRATION, *DEVICE)
WORK = (*CONVERT, "--allocation", "global", "--work", "work")
TARGETED = _targets()


def make_bases(root: Path, run: Run) -> None:
    """Make all bases, each a folder in ``root``.

    Args:
        root: where to.
        run: how to run a command.
    """
    _dense(root)
    for name, source in (("factored", "neox"), ("factored-llama", "llama")):
        folder = root / name
        shutil.copytree(root / source, folder)
        run(CONVERT, folder, None)
        (folder / "out").rename(folder / "f")
        _adapter(folder / "f", folder / "a")
    for name, commands in (
        ("done", [CONVERT]),
        ("stats", [CALIBRATE]),
        ("work", [WORK]),
        ("sweep", [SWEEP]),
    ):
        shutil.copytree(root / "neox", root / name)
        for command in commands:
            run(command, root / name, None)
    shutil.rmtree(root / "work" / "out")
    shutil.copytree(root / "neox", root / "job")
    run(CONVERT, root / "job", 7)
    assert (root / "job" / "out" / ".svdconvert" / "job.json").is_file()


def _dense(root: Path) -> None:
    """Models: with and without generation_config.json, tied and not, one file and shards, safetensors and pickles."""
    text = " ".join(["호랑이", "tiger", "옛날", "mountain", "0123"] * 60)
    write_checkpoint(root / "neox" / "m")
    write_family(root / "llama" / "m", "llama", generation=False, tie_word_embeddings=True, **SMALL)
    write_family(root / "shards" / "m", "gpt2", generation=True, max_shard_size="60kB", n_inner=48, hidden_size=32)
    write_family(root / "pickle" / "m", "llama", generation=True, tie_word_embeddings=False, **SMALL)
    pickle_weights(root / "pickle" / "m")
    write_checkpoint(root / "pickles" / "m", shards=3, pickled=True, legacy=True, generation=None)
    write_gguf(root / "gguf" / "m.gguf", tiny("llama", num_hidden_layers=1), kind="Q8_0")
    for name in DENSE:
        (root / name / "text.txt").write_text(text, encoding="utf-8")


def _adapter(factored: Path, folder: Path) -> None:
    """A LoRA adapter for some layers of a factored model, as peft saves one."""
    import json

    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    config = json.loads((factored / "config.json").read_text())
    weights = load_file(factored / "model.safetensors")
    tensors = {}
    prefix = "gpt_neox." if any(name.startswith("gpt_neox.") for name in weights) else "model."
    for module in [module for module in config["svd_ranks"] if module.startswith("layers.1.")][:3]:
        down, up = weights[f"{prefix}{module}.down.weight"], weights[f"{prefix}{module}.up.weight"]
        rank = 4 if "attention" in module or "attn" in module else 2
        for half, shape in (("A", (rank, down.shape[1])), ("B", (up.shape[0], rank))):
            name = f"base_model.model.{prefix}{module}.lora_{half}.weight"
            tensors[name] = 0.1 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "f",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {r"layers\.\d+\.mlp\..*": 2} if prefix == "model." else {"mlp.dense_h_to_4h": 2},
        "revision": None,
        "target_modules": sorted({name.rsplit(".", 3)[1] for name in tensors}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
