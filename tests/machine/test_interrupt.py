"""Killed, interrupted and broken off at every moment: the same command finishes the job, to the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import CONFIG, content, random_tensors, tree, write_checkpoint

from svdconvert import convert
from svdconvert.errors import InputError
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.methods import table as metrics
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step
from svdconvert.storage.headers import read_header

# Importing torch costs seconds and forking milliseconds: one process imports everything, and every command is then a
# process of its own, forked from it. In each, what changes the disk is counted; the process kills itself with SIGKILL
# at the call it is told to, or waits there for a file, so that the test decides what happens at that moment.
ZYGOTE = r"""
import json, os, signal, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from svdconvert import program
from svdconvert.cli import progress, report
from svdconvert.commands import convert, densify, fold, verify
from svdconvert.jobs import pipeline, shard_writer
from svdconvert.machine import interrupts
from svdconvert.models import loading
from svdconvert.modeling import modeling_polyglot_svd

CALLS = "open mkdir pwrite write fsync replace posix_fallocate ftruncate unlink rmdir".split()

def watch(order):
    seen, lock = [], threading.Lock()
    def wrap(name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            with lock:
                seen.append(name + " " + str(args[-1] if name == "replace" else args[0]))
                hit = len(seen) == order.get("at")
            if hit and order["do"] == "kill before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if hit and order["do"] == "kill after":
                os.kill(os.getpid(), signal.SIGKILL)
            if hit and order["do"] == "wait":
                Path(order["flag"] + ".reached").touch()
                while not Path(order["flag"] + ".go").exists():
                    time.sleep(0.01)
            return result
        return call
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    return seen

def interrupt_at(moment, seen):
    # Ctrl-C between two steps of the main thread: a function is called, or returns.
    def profile(frame, event, argument):
        seen[0] += 1
        if seen[0] == moment:
            os.kill(os.getpid(), signal.SIGINT)
    sys.setprofile(profile)

def child(order):
    # As from a terminal, whatever the process that runs the tests does with SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_IGN if order["ignoring"] else signal.default_int_handler)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order["files"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    shard_writer.BATCH_BYTES, shard_writer.BATCH_SECONDS = order["batch"], 1e9
    seen, code, steps = watch(order), 70, [0]
    sys.argv = ["svdconvert", *order["args"]]
    try:
        if order["interrupt"] is not None:
            interrupts.install()  # as the first thing that the program does
            interrupt_at(order["interrupt"], steps)
        program.run()
    except SystemExit as end:
        code = end.code or 0
    finally:
        if order["interrupt"] is not None:
            sys.setprofile(None)
            Path(order["files"] + ".steps").write_text(str(steps[0]))
        sys.stdout.flush(), sys.stderr.flush()
        Path(order["files"] + ".calls").write_text("\n".join(seen))
    # As at the end of a real process: wait for threads that are not daemons.
    threading._shutdown()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    if (pid := os.fork()) == 0:
        child(order)
    print(pid, flush=True)
"""


class Started:
    """A command that runs, in a process of its own."""

    def __init__(self, zygote: Zygote, pid: int, files: str, flag: Path) -> None:
        self.pid, self._zygote, self._files, self._flag = pid, zygote, files, flag

    def reached(self) -> None:
        """Come back when the process waits at the call it was told to."""
        for _ in range(12000):
            if Path(f"{self._flag}.reached").exists():
                return
            time.sleep(0.01)
        raise AssertionError("the process never came to that call")

    def says(self, text: str) -> None:
        """Come back when it has said so on standard output."""
        for _ in range(6000):
            if text in Path(f"{self._files}.out").read_text():
                return
            time.sleep(0.01)
        raise AssertionError(f"the process never said {text!r}")

    def has_ended(self) -> bool:
        """Whether it ends within a minute, without being told to go on."""
        for _ in range(3000):
            if Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            time.sleep(0.02)
        return False

    def go(self) -> None:
        """Let it go on from there."""
        Path(f"{self._flag}.go").touch()

    def wait(self) -> Ended:
        return Ended(self._zygote.ask({"wait": self.pid}), self._files)


class Ended:
    """Exit status (negative: the signal that killed it) and output of a command."""

    def __init__(self, status: int, files: str) -> None:
        self.status = status
        self.out, self.err = (Path(f"{files}.{name}").read_text() for name in ("out", "err"))
        calls = Path(f"{files}.calls")
        self.calls = calls.read_text().splitlines() if calls.exists() else []

        steps = Path(f"{files}.steps")
        self.steps = int(steps.read_text()) if steps.exists() else 0

    def __repr__(self) -> str:
        return f"status {self.status}\n{self.out}\n{self.err}"


class Zygote:
    """Starts commands of the tool."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self,
        *args: object,
        at: int | None = None,
        do: str = "",
        batch: int = 1,
        interrupt: int | None = None,
        ignoring: bool = False,
    ) -> Started:
        """Start a command; ``do`` this ``at`` that call; with ``batch=1`` every step is recorded by itself.

        ``interrupt``: Ctrl-C at that step of the main thread (0 counts them); ``ignoring``: with SIGINT ignored.
        """
        self.count += 1
        files, flag = str(self.folder / str(self.count)), self.folder / f"{self.count}.flag"
        order = {"args": [str(a) for a in args], "files": files, "at": at, "do": do, "flag": str(flag), "batch": batch}
        order |= {"interrupt": interrupt, "ignoring": ignoring}
        return Started(self, self.ask(order), files, flag)

    def run(self, *args: object, **options: Any) -> Ended:
        return self.start(*args, **options).wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(120)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    process = Zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of the tiny model, so that the whole job is a hundred calls."""
    tensors = {
        name: tensor
        for name, tensor in random_tensors().items()
        if ".layers." not in name or name.startswith("gpt_neox.layers.0.")
    }
    folder = tmp_path_factory.mktemp("small") / "model"
    return write_checkpoint(folder, tensors, shards=2, config={"num_hidden_layers": 1})


@pytest.fixture(scope="module")
def reference(zygote: Zygote, small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The undisturbed result, and the calls that it took."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    ended = zygote.run(*command(small, folder))
    assert ended.status == 0, ended
    assert len(list(folder.glob("*.safetensors"))) >= 3
    assert not (folder / JOB_FOLDER).exists()
    return folder, ended.calls


def command(model: Path, out: Path, *options: object) -> list[object]:
    return [model, "--rank", 16, "--max-shard-size", "30KB", "--device", "cpu", "--no-check", "--out", out, *options]


def assert_nothing_half(folder: Path, expected: Path) -> None:
    """Every file that has its final name is whole, and config.json is there only with all the others."""
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(".tmp")}
    for name in names:
        assert content(folder / name) == content(expected / name), name
        if name.endswith(".safetensors"):
            read_header(folder / name)
    if "config.json" in names:
        assert names == {path.name for path in expected.iterdir()}


def moments(calls: list[str], do: str) -> list[int]:
    """The calls around which the folder's state changes, and some of all the others."""

    def of(*kinds: str) -> list[int]:
        return [i for i, call in enumerate(calls, 1) if call.split()[0] in kinds]

    if do == "kill before":
        return sorted({*of("replace", "unlink", "rmdir"), *of("write")[::4], *range(1, len(calls) + 1, 12)})
    # A file that was just opened for writing is empty. Otherwise, after one call is mostly before the next.
    return sorted({*of("open")[::2], *of("rmdir"), *range(1, len(calls) + 1, 24)})


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


@pytest.mark.parametrize("seed", range(3))
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
    assert "4 matrices were done by an earlier run; continuing with 0" in again.out
    assert not [call for call in again.calls if call.startswith("pwrite")]


def test_densify_is_killed_and_continued(zygote: Zygote, reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    """All jobs share the writer; one other than convert shows that they do."""
    model, expected = reference[0], tmp_path / "expected"
    args = ["densify", model, "--max-shard-size", "50KB", "--device", "cpu", "--out"]
    whole = zygote.run(*args, expected)
    assert whole.status == 0, whole
    for at in range(2, len(whole.calls), len(whole.calls) // 6):
        out = tmp_path / f"at-{at}"
        kill_and_continue(zygote, [*args, out], out, expected, at, "kill before")


def mid_job(calls: list[str]) -> int:
    """A call in the middle of the weights, after at least one file got its final name."""
    renames = [i for i, call in enumerate(calls, 1) if call.startswith("replace") and call.endswith(".safetensors")]
    return renames[0] + 9


@pytest.fixture
def unfinished(zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A job that was killed half-way."""
    out = tmp_path / "unfinished"
    ended = zygote.run(*command(small, out), at=mid_job(reference[1]), do="kill before")
    assert ended.status == -signal.SIGKILL
    assert (out / JOB_FOLDER / "journal.jsonl").stat().st_size > 0
    assert list(out.glob("*.safetensors"))
    assert list((out / JOB_FOLDER).glob("*.partial"))
    assert not (out / "config.json").exists()
    return out


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
    few = [1, 2, 50, whole.steps - 200, whole.steps - 20, whole.steps - 2]
    for at in [*few, *(choose.randrange(1, whole.steps) for _ in range(moments))]:
        out = folder / f"at-{at}"
        ended = zygote.run(*args(out), interrupt=at)
        # How many steps a run has depends on how often its main thread wakes up.
        assert (ended.status, ended.err) in [(1, SENTENCE), (0, "")], (at, ended)
        assert "Traceback" not in ended.out, ended
        count += ended.status
    return count


@pytest.mark.parametrize("workers", [1, 3])
def test_ctrl_c_at_any_moment_of_a_conversion(
    workers: int, zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Threads that start, imports, files that are written, the end: and each run can be continued."""

    def args(out: Path) -> list[object]:
        return command(small, out, "--workers", workers)

    assert interrupted_everywhere(zygote, args, tmp_path, 25) >= 25
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


@pytest.mark.parametrize("name", ["calibrate", "densify", "spectrum", "evaluate", "plan", "help"])
def test_ctrl_c_at_any_moment_of_other_commands(
    name: str, zygote: Zygote, small: Path, reference: tuple[Path, list[str]], text: Path, tmp_path: Path
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
    assert interrupted_everywhere(zygote, lines[name], tmp_path, 8) >= 8


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


def test_two_at_once(zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    expected, calls = reference
    out = tmp_path / "out"
    first = zygote.start(*command(small, out), at=mid_job(calls), do="wait")
    first.reached()
    before = tree(out)
    for options in ([], ["--overwrite"]):
        second = zygote.run(*command(small, out, *options))
        assert second.status == 2
        (who,) = re.findall(r"process (\d+) on [^ ]+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", second.err)
        assert int(who) == first.pid
        assert second.err.startswith(f"Error: {out} is in use by another svdconvert (")
        assert second.err.endswith("); wait for it to end\n")
        assert tree(out) == before
    first.go()
    assert first.wait().status == 0
    assert tree(out) == tree(expected)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--rank", "8"], "rank"),
        (["--keep", "0.5"], "rank"),
        (["--rank", "16", "--rank", "attention.dense=8"], "rank patterns"),
        (["--rank", "16", "--targets", "mlp.*"], "targets"),
        (["--rank", "16", "--dtype", "float32"], "dtype"),
        (["--rank", "16", "--factor-all"], "factor all"),
        (["--rank", "16", "--max-shard-size", "1MB"], "max shard bytes"),
    ],
)
def test_another_request_is_refused(
    options: list[str], field: str, zygote: Zygote, small: Path, unfinished: Path
) -> None:
    before = tree(unfinished)
    size = [] if "--max-shard-size" in options else ["--max-shard-size", "30KB"]
    ended = zygote.run(small, *options, *size, "--device", "cpu", "--out", unfinished)
    assert ended.status == 2, ended
    assert ended.err.startswith(f"Error: {unfinished} holds an unfinished job with another {field} (")
    assert "--overwrite" in ended.err
    assert tree(unfinished) == before


def resume(model: Path, out: Path) -> None:
    convert(model, out, rank=16, max_shard_size=30_000, device="cpu", check=False)


def test_another_source_is_refused(zygote: Zygote, unfinished: Path, tmp_path: Path) -> None:
    """Same shapes, same names, other numbers."""
    tensors = {n: t for n, t in random_tensors(seed=1).items() if ".layers." not in n or ".layers.0." in n}
    other = write_checkpoint(tmp_path / "model", tensors, shards=2, config={"num_hidden_layers": 1})
    ended = zygote.run(*command(other, unfinished))
    assert ended.status == 2, ended
    assert "unfinished job with another weights (" in ended.err


def test_a_rewritten_source_file_is_refused(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(small, model)
    assert zygote.run(*command(model, out), at=mid_job(reference[1]), do="kill before").status == -signal.SIGKILL
    file = sorted(model.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ended = zygote.run(*command(model, out))
    assert ended.status == 2, ended
    assert "unfinished job with another weights (" in ended.err
    assert zygote.run(*command(model, out, "--overwrite")).status == 0


def test_another_method_is_refused(small: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(metrics.METHODS["svd"], name="other")
    monkeypatch.setattr(metrics, "METHODS", {**metrics.METHODS, "other": other})
    with pytest.raises(InputError, match=r'unfinished job with another method \("svd", now "other"\)'):
        convert(small, unfinished, rank=16, method="other", max_shard_size=30_000, device="cpu")


def test_another_version_is_refused(small: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a model by one version and half by another could not be told from either."""
    monkeypatch.setattr("svdconvert.jobs.job.__version__", "99.0")
    with pytest.raises(InputError, match="unfinished job with another svdconvert"):
        resume(small, unfinished)


def test_another_command_is_refused(zygote: Zygote, reference: tuple[Path, list[str]], unfinished: Path) -> None:
    ended = zygote.run("densify", reference[0], "--device", "cpu", "--out", unfinished)
    assert ended.status == 2, ended
    assert "unfinished job with another command" in ended.err


def test_a_finished_result_of_another_rank_is_refused(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]]
) -> None:
    before = tree(reference[0])
    ended = zygote.run(*command(small, reference[0], "--rank", "attention.dense=8"))
    assert ended.status == 2, ended
    assert ended.err.startswith(f"Error: {reference[0]} holds a converted model with another rank patterns (")
    assert tree(reference[0]) == before


def test_overwrite_starts_anew(zygote: Zygote, small: Path, unfinished: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    other = ["--rank", "attention.dense=8"]
    assert zygote.run(*command(small, clean, *other)).status == 0
    ended = zygote.run(*command(small, unfinished, *other, "--overwrite"))
    assert ended.status == 0, ended
    assert "earlier run" not in ended.out
    assert tree(unfinished) == tree(clean)


def tear_journal(folder: Path) -> None:
    journal = folder / JOB_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])


def append_garbage(folder: Path) -> None:
    with (folder / JOB_FOLDER / "journal.jsonl").open("ab") as handle:
        handle.write(b'{"step": "gpt_neox.layers.0.att\xff\x00\n{"st')


def append_zeros(folder: Path) -> None:
    """What some file systems leave of an append after a power failure: its length."""
    with (folder / JOB_FOLDER / "journal.jsonl").open("ab") as handle:
        handle.write(bytes(300))


def delete_journal(folder: Path) -> None:
    (folder / JOB_FOLDER / "journal.jsonl").unlink()


def delete_partial(folder: Path) -> None:
    for path in (folder / JOB_FOLDER).glob("*.partial"):
        path.unlink()


def shorten_partial(folder: Path) -> None:
    for path in (folder / JOB_FOLDER).glob("*.partial"):
        os.truncate(path, path.stat().st_size // 2)


def delete_finished_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def shorten_finished_file(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)


def delete_lock(folder: Path) -> None:
    (folder / JOB_FOLDER / "lock").unlink()


def leave_temporary_file(folder: Path) -> None:
    (folder / ".README.md.tmp").write_text("half a ca")


@pytest.mark.parametrize(
    "damage",
    [
        tear_journal,
        append_garbage,
        append_zeros,
        delete_journal,
        delete_partial,
        shorten_partial,
        delete_finished_file,
        shorten_finished_file,
        delete_lock,
        leave_temporary_file,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damaged_leftovers_are_done_again(
    damage: Callable[[Path], None], zygote: Zygote, small: Path, unfinished: Path, reference: tuple[Path, list[str]]
) -> None:
    damage(unfinished)
    ended = zygote.run(*command(small, unfinished))
    assert (ended.status, ended.err) == (0, ""), ended
    assert tree(unfinished) == tree(reference[0])


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
