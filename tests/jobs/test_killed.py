"""Killed at every moment: the same command finishes the job, to the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import CONFIG, tree
from support.moments import Zygote, assert_nothing_half, command, mid_job

from svdconvert.jobs.own_files import JOB_FOLDER


def moments(calls: list[str], do: str) -> list[int]:
    """The calls around which the folder's state changes, and some of all the others."""

    def of(*kinds: str) -> list[int]:
        return [i for i, call in enumerate(calls, 1) if call.split()[0] in kinds]

    if do == "kill before":
        return sorted({*of("replace", "unlink", "rmdir"), *of("write")[::8], *range(1, len(calls) + 1, 24)})
    # A file that was just opened for writing is empty. Otherwise, after one call is mostly before the next.
    return sorted({*of("open")[::4], *of("rmdir"), *range(1, len(calls) + 1, 48)})


def kill_and_continue(zygote: Zygote, args: list[object], out: Path, expected: Path, at: int, do: str) -> bool:
    """Kill at one moment, look, continue, compare. Returns whether it was killed before its end."""
    killed = zygote.run(*args, at=at, do=do)
    assert killed.status in (-signal.SIGKILL, 0), killed
    if out.exists():
        assert_nothing_half(out, expected)
    again = zygote.run(*args)
    assert (again.status, again.err) == (0, ""), (at, do, again)
    assert tree(out) == tree(expected), (at, do)
    return killed.status != 0


def test_the_moments_cover_the_protocol(reference: tuple[Path, list[str]]) -> None:
    """The kills below are worth something only if these calls are among those that are counted."""
    folder, calls = reference
    renames = [Path(call.split()[1]).name for call in calls if call.startswith("replace")]
    assert renames[0] == "job.json"
    assert renames[-1] == "config.json"
    assert {path.name for path in folder.iterdir()} <= set(renames)
    assert sum(call.startswith("write") for call in calls) >= 10
    assert {call.split()[0] for call in calls} >= {
        "mkdir",
        "open",
        "pwrite",
        "fsync",
        "posix_fallocate",
        "unlink",
        "rmdir",
    }


@pytest.mark.parametrize("do", ["kill before", "kill after"])
def test_killed_at_any_moment(
    do: str, zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, calls = reference
    chosen = moments(calls, do)
    killed = 0
    for at in chosen:
        out = tmp_path / f"at-{at}"
        killed += kill_and_continue(zygote, command(small, out), out, expected, at, do)
        shutil.rmtree(out)
    assert killed >= len(chosen) - 3


@pytest.mark.slow
@pytest.mark.parametrize("do", ["kill before", "kill after"])
def test_killed_at_every_single_moment(
    do: str, zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, calls = reference
    for at in range(1, len(calls) + 1):
        out = tmp_path / f"at-{at}"
        kill_and_continue(zygote, command(small, out), out, expected, at, do)
        shutil.rmtree(out)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_killed_again_and_again(
    seed: int, zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Every run gets a little further, until one comes to the end."""
    expected, calls = reference
    choose, out = random.Random(seed), tmp_path / "out"
    for _ in range(8):
        at, batch = choose.randrange(5, len(calls)), choose.choice([1, 20_000, 32_000_000])
        ended = zygote.run(*command(small, out), at=at, do="kill before", batch=batch)
        assert ended.status in (-signal.SIGKILL, 0), ended
        assert_nothing_half(out, expected)
    assert zygote.run(*command(small, out)).status == 0
    assert tree(out) == tree(expected)


def test_killed_while_an_older_result_is_replaced(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """With --overwrite on a finished result of another rank, the folder is the old model, no model, or the new one."""
    expected, _ = reference
    old = tmp_path / "old"
    assert zygote.run(*command(small, old, "--rank", "attention.dense=8")).status == 0
    for at in (1, 3, 4, 5, 7, 10, 14):
        out = tmp_path / f"at-{at}"
        shutil.copytree(old, out)
        killed = zygote.run(*command(small, out, "--overwrite"), at=at, do="kill before")
        assert killed.status == -signal.SIGKILL, killed
        if (out / "config.json").exists():
            assert tree(out).items() >= tree(old).items()
        again = zygote.run(*command(small, out, "--overwrite"))
        assert again.status == 0, again
        assert tree(out) == tree(expected)


def test_finished_work_is_not_done_again(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, calls = reference
    out = tmp_path / "out"
    renames = [i for i, call in enumerate(calls, 1) if call.startswith("replace")]
    before_config = renames[-1]
    assert zygote.run(*command(small, out), at=before_config, do="kill before").status == -signal.SIGKILL
    again = zygote.run(*command(small, out, "-v"))
    assert again.status == 0
    assert "what an earlier run did of 4 matrices is used again" in again.out
    assert not [call for call in again.seen["calls"] if call.startswith("pwrite")]


def test_densify_is_killed_and_continued(zygote: Zygote, reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    """All jobs share the writer; one other than convert shows that they do."""
    model, expected = reference[0], tmp_path / "expected"
    args = ["densify", model, "--max-shard-size", "50KB", "--device", "cpu", "--out"]
    whole = zygote.run(*args, expected)
    assert whole.status == 0, whole
    for at in range(2, len(whole.seen["calls"]), len(whole.seen["calls"]) // 4):
        out = tmp_path / f"at-{at}"
        kill_and_continue(zygote, [*args, out], out, expected, at, "kill before")


def test_a_real_process_killed_from_outside(small: Path, reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    """No forks, no hooks: `python -m svdconvert`, SIGKILL as soon as it works, and the command once more."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "svdconvert", *map(str, command(small, out))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment)
    while not (out / JOB_FOLDER / "job.json").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_half(out, reference[0])
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(out) == tree(reference[0])


def test_several_workers_give_the_same_bytes(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """And a job begun with one worker may be finished with three."""
    out = tmp_path / "out"
    zygote.run(*command(small, out), at=mid_job(reference[1]), do="kill before")
    ended = zygote.run(*command(small, out, "--workers", 3))
    assert ended.status == 0, ended
    assert tree(out) == tree(reference[0])


def test_the_reference_is_right(small: Path, reference: tuple[Path, list[str]]) -> None:
    """Equal bytes mean something only if they are the right ones."""
    tensors = {k: v for file in reference[0].glob("*.safetensors") for k, v in load_file(file).items()}
    dense = {k: v for file in small.glob("*.safetensors") for k, v in load_file(file).items()}
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    product = tensors[f"{name}.up.weight"].double() @ tensors[f"{name}.down.weight"].double()
    weight = dense[f"{name}.weight"].double()
    spectrum = torch.linalg.svdvals(weight)
    optimum = (spectrum[16:].square().sum() / spectrum.square().sum()).sqrt()
    assert float((weight - product).norm() / weight.norm()) == pytest.approx(float(optimum), rel=1e-3)
    assert torch.equal(tensors["gpt_neox.embed_in.weight"], dense["gpt_neox.embed_in.weight"])
    assert CONFIG["vocab_size"] == len(tensors["gpt_neox.embed_in.weight"])
