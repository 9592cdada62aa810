"""Killed at random moments, once or more: the same command then gives the bytes of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import content, random_tensors, write_checkpoint
from support.forked import Forked

from svdconvert import convert
from svdconvert.jobs.own_files import JOB_FOLDER

# How often a job records what it has done: after every step, every few, or as it does by itself.
BATCHES = (1, 20_000, 32_000_000)


def timeless(value: Any) -> Any:
    """JSON without what is measured by the clock."""
    if isinstance(value, dict):
        return {key: timeless(v) for key, v in value.items() if key not in ("seconds", "timing")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def tree(folder: Path) -> dict[str, object]:
    """What must be equal: all files but what a job leaves for its next run."""
    return {
        str(path.relative_to(folder)): timeless(json.loads(path.read_text()))
        if path.name == "sweep.json"
        else content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and JOB_FOLDER not in path.relative_to(folder).parts
    }


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    found = Forked(tmp_path_factory.mktemp("forked"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of one and two blocks, one as .bin, a factored one, an adapter and texts."""
    folder = tmp_path_factory.mktemp("inputs")

    def blocks(count: int) -> dict[str, torch.Tensor]:
        kept = [f".layers.{layer}." for layer in range(count)]
        return {n: t for n, t in random_tensors().items() if ".layers." not in n or any(part in n for part in kept)}

    write_checkpoint(folder / "one", blocks(1), shards=2, config={"num_hidden_layers": 1})
    write_checkpoint(folder / "two", blocks(2), config={"num_hidden_layers": 2})
    (folder / "two" / "generation_config.json").unlink()
    write_checkpoint(folder / "bin", blocks(1), shards=2, pickled=True, config={"num_hidden_layers": 1})
    convert(folder / "two", folder / "factored", rank=16, device="cpu", check=False)
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
    """Every kind of job; the folder that it writes comes behind."""
    checked = ["--max-shard-size", "60KB", "--device", "cpu", "--out"]
    small = ["--no-check", *checked]
    text = ["--calib", inputs / "text.txt", "--calib-samples", 4, "--calib-length", 16, "--calib-batch-size", 4]
    pivoted = ["--layout", "pivoted"]
    return {
        "plain": [inputs / "two", "--rank", 16, *small],
        "kfac, refit": [inputs / "one", "--keep", 0.4, *text, *pivoted, "--refit", "sequential", *small],
        "shared": [inputs / "two", "--rank", 16, "--share-layers", 2, "--method", "whiten", *text, *small],
        "split": [inputs / "two", "--rank", 16, "--split-fused", *pivoted, *small],
        "bin": [inputs / "bin", "--rank", 16, *small],
        "densify": ["densify", inputs / "factored", *checked],
        "fold": ["fold", inputs / "factored", "--adapter", inputs / "adapter", *checked],
        "calibrate": ["calibrate", inputs / "two", *text, "--device", "cpu", "--out"],
        "sweep": [
            *("sweep", inputs / "one", "--text", inputs / "heldout.txt", "--rank", 8, "--rank", 16, "--method", "svd"),
            *("--no-plot", "--keep-models", "--device", "cpu", "--out"),
        ],
    }


@dataclass(frozen=True)
class Case:
    """A command, the files of its undisturbed result, and how long that takes."""

    args: Sequence[object]
    expected: dict[str, object]
    seconds: float


@pytest.fixture(scope="module")
def cases(forked: Forked, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for name, args in commands(inputs).items():
        runs = [forked.run(*args, folder / f"{name}-{i}") for i in range(2)]  # the first one imports
        assert [ended.status for ended in runs] == [0, 0], runs
        expected = tree(folder / f"{name}-0")
        assert expected == tree(folder / f"{name}-1"), name
        assert expected
        found[name] = Case(args, expected, runs[1].seconds)
    return found


def kill_and_continue(forked: Forked, case: Case, out: Path, choice: random.Random) -> int:
    """Kill a command until a run may come to its end; returns how often it was killed."""
    killed = 0
    for _ in range(choice.choice((1, 1, 2, 3))):
        constants = {"svdconvert.jobs.shard_writer.BATCH_BYTES": choice.choice(BATCHES)}
        ended = forked.run(*case.args, out, kill=choice.uniform(0.0, 1.1 * case.seconds), constants=constants)
        assert ended.status in (0, -signal.SIGKILL), ended
        killed += ended.status != 0
        finished = (out / "config.json").is_file()
        for name, whole in tree(out).items() if out.exists() else ():
            if finished or name.endswith(".safetensors"):  # a final name is that of a whole file
                assert name.endswith(".tmp") or whole == case.expected[name], (case.args, name)
    again = forked.run(*case.args, out)
    assert (again.status, again.err) == (0, ""), (case.args, again)
    assert tree(out) == case.expected, case.args
    return killed


def kill_all(forked: Forked, cases: dict[str, Case], folder: Path, runs: int) -> Counter[str]:
    """So many jobs killed, the kinds in turn; returns kills by kind."""
    choice, kills = random.Random(runs), Counter[str]()
    for i in range(runs):
        name = list(cases)[i % len(cases)]
        out = folder / str(i)
        kills[name] += kill_and_continue(forked, cases[name], out, choice)
        shutil.rmtree(out)
    return kills


def test_killed_at_random(forked: Forked, cases: dict[str, Case], tmp_path: Path) -> None:
    kills = kill_all(forked, cases, tmp_path, 20)
    assert sum(kills.values()) >= 10, kills


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_300_times(forked: Forked, cases: dict[str, Case], tmp_path: Path) -> None:
    kills = kill_all(forked, cases, tmp_path, 300)
    print(dict(kills), {name: round(case.seconds, 2) for name, case in cases.items()})
    assert sum(kills.values()) >= 150, kills
    assert all(kills[name] for name in cases), kills
