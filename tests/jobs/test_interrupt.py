"""Ctrl-C at every moment: one sentence, nothing half-written, and the same command finishes the job."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tree
from support.moments import Zygote, assert_nothing_half, command, mid_job

from svdconvert import convert
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step

SENTENCE = "Error: the job was interrupted; run the same command to continue\n"


def test_ctrl_c(zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    expected, calls = reference
    out = tmp_path / "out"
    started = zygote.start(*command(small, out), at=mid_job(calls), do="wait")
    started.reached()
    os.kill(started.pid, signal.SIGINT)
    started.says("stopping after the current matrix")
    started.go()
    ended = started.wait()
    assert (ended.status, ended.err) == (1, SENTENCE), ended
    assert_nothing_half(out, expected)
    assert not (out / "config.json").exists()
    again = zygote.run(*command(small, out))
    assert (again.status, again.err) == (0, "")
    assert tree(out) == tree(expected)


def test_second_ctrl_c_does_not_wait_for_the_matrix(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    expected, calls = reference
    out = tmp_path / "out"
    started = zygote.start(*command(small, out), at=mid_job(calls), do="wait")
    started.reached()
    os.kill(started.pid, signal.SIGINT)
    started.says("stopping after the current matrix")
    os.kill(started.pid, signal.SIGINT)
    # The writer's thread is never let go: only a process that does not wait for it can end.
    ended_alone = started.has_ended()
    if not ended_alone:
        started.go()
    ended = started.wait()
    assert ended_alone, "the process waited for its threads"
    assert (ended.status, ended.err) == (1, SENTENCE), ended
    assert zygote.run(*command(small, out)).status == 0
    assert tree(out) == tree(expected)


def interrupted_everywhere(zygote: Zygote, args: Callable[[Path], list[object]], folder: Path, moments: int) -> int:
    """Ctrl-C at many steps of the main thread, the first and the last ones among them: one sentence each time.

    Returns how many runs it ended; a run that is through by then has done its work.
    """
    whole = zygote.run(*args(folder / "whole"), interrupt=0)
    assert (whole.status, whole.err) == (0, ""), whole
    choose, count = random.Random(str(args(Path()))), 0
    few = [1, 2, 50, whole.seen["steps"] - 200, whole.seen["steps"] - 20, whole.seen["steps"] - 2]
    for at in [*few, *(choose.randrange(1, whole.seen["steps"]) for _ in range(moments))]:
        out = folder / f"at-{at}"
        ended = zygote.run(*args(out), interrupt=at)
        # How many steps a run has depends on how often its main thread wakes up.
        assert (ended.status, ended.err) in [(1, SENTENCE), (0, "")], (at, ended)
        assert "Traceback" not in ended.out, ended
        count += ended.status
    return count


@pytest.mark.parametrize("moments", [10, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [1, 3])
def test_ctrl_c_at_any_moment_of_a_conversion(
    workers: int, moments: int, zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Threads that start, imports, files that are written, the end: and each run can be continued."""

    def args(out: Path) -> list[object]:
        return command(small, out, "--workers", workers)

    assert interrupted_everywhere(zygote, args, tmp_path, moments) >= moments
    for out in sorted(tmp_path.glob("at-*"))[::3]:
        again = zygote.run(*args(out))
        assert (again.status, again.err) == (0, ""), again
        assert tree(out) == tree(reference[0])


def test_ctrl_c_at_any_moment_of_a_calibrated_conversion(
    zygote: Zygote, small: Path, text: Path, tmp_path: Path
) -> None:
    reading = ["--calib", text, "--calib-samples", 6, "--calib-length", 24, "--workers", 2]

    def args(out: Path) -> list[object]:
        return [small, "--keep", 0.6, "--refit", "sequential", "--device", "cpu", *reading, "--out", out]

    assert interrupted_everywhere(zygote, args, tmp_path, 10) >= 10
    for out in sorted(tmp_path.glob("at-*"))[::5]:
        again = zygote.run(*args(out))
        assert (again.status, again.err) == (0, ""), again
        assert weights(out) == weights(tmp_path / "whole")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("moments", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["calibrate", "densify", "spectrum", "evaluate", "plan", "help"])
def test_ctrl_c_at_any_moment_of_other_commands(
    name: str,
    moments: int,
    zygote: Zygote,
    small: Path,
    reference: tuple[Path, list[str]],
    text: Path,
    tmp_path: Path,
) -> None:
    reading = ["--calib", text, "--calib-samples", 6, "--calib-length", 24]
    lines: dict[str, Callable[[Path], list[object]]] = {
        "calibrate": lambda out: ["calibrate", small, *reading, "--device", "cpu", "--out", out],
        "densify": lambda out: ["densify", reference[0], "--device", "cpu", "--out", out],
        "spectrum": lambda out: ["spectrum", small, "--device", "cpu"],
        "evaluate": lambda out: ["evaluate", small, "--text", text, "--window", 32, "--device", "cpu"],
        "plan": lambda out: ["plan", small, "--rank", 16],
        "help": lambda out: ["convert", "--help"],
    }
    assert interrupted_everywhere(zygote, lines[name], tmp_path, moments) >= moments


# As `python -m svdconvert`, with Ctrl-C when the program asks for its n-th module, or when the test sends it.
PROGRAM = r"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignoring" else signal.default_int_handler)
from svdconvert.machine import interrupts
from svdconvert.program import run
seen, moment = [0], int(sys.argv[2])
def hook(event, arguments):
    if event == "import":
        seen[0] += 1
        if seen[0] == moment:
            os.kill(os.getpid(), signal.SIGINT)
interrupts.install()
if moment:
    sys.addaudithook(hook)
print("ready", flush=True)
sys.argv = ["svdconvert", *sys.argv[3:]]
run()
"""


def started(*args: object, moment: int = 0, signals: str = "default") -> subprocess.Popen[str]:
    line = [sys.executable, "-c", PROGRAM, signals, str(moment), *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("moment", [1, 5, 20, 60, 200, 700, 1500])
def test_ctrl_c_while_modules_are_imported(moment: int, small: Path, tmp_path: Path) -> None:
    process = started(*command(small, tmp_path / "out"), moment=moment)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (1, SENTENCE), err
    assert "Traceback" not in out


@pytest.mark.parametrize("moment", [1, 10, 40])
def test_ctrl_c_during_help(moment: int) -> None:
    process = started("--help", moment=moment)
    assert (process.communicate(timeout=900)[1], process.returncode) == (SENTENCE, 1)


@pytest.mark.parametrize("seed", range(4))
def test_ctrl_c_at_any_time_of_a_real_process(
    seed: int, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(*command(small, out))
    time.sleep(random.Random(seed).uniform(0, 4))
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=900)[1]
    assert (process.returncode, err) in [(1, SENTENCE), (0, "")]
    if out.exists():
        assert_nothing_half(out, reference[0])


def test_sigint_that_was_ignored_at_the_start_stays_so(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """As `nohup svdconvert ... &` in a script: somebody's Ctrl-C is not for it."""
    for moment in (1, 1000, 3000):
        out = tmp_path / str(moment)
        ended = zygote.run(*command(small, out), interrupt=moment, ignoring=True)
        assert (ended.status, ended.err) == (0, "")
        assert tree(out) == tree(reference[0])


def test_an_interrupt_of_a_program_that_uses_the_library(small: Path, tmp_path: Path) -> None:
    """There nothing is done with signals; Python's KeyboardInterrupt comes through, and the same call continues."""
    out, before = tmp_path / "out", signal.getsignal(signal.SIGINT)

    class Impatient(Events):
        def solved(self, step: Step, report: Mapping[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(small, out, rank=16, device="cpu", check=False, workers=2, events=Impatient())
    assert signal.getsignal(signal.SIGINT) is before
    assert not (out / "config.json").exists()
    assert convert(small, out, rank=16, device="cpu", check=False).outcome.resumed >= 1
