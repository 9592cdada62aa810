"""Commands that are killed, interrupted or made to wait at a moment: a call that changes the disk, or a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from support.checkpoints import content
from support.forked import BATCH_BYTES, BATCH_SECONDS, Ended, Forked, Running
from svdconvert.storage.headers import read_header

# What changes the disk is counted; the process kills itself with SIGKILL at the call that the order names, or waits
# there for a file, so that the test decides what happens at that moment.
HOOKS = r"""
import os, signal, sys, threading, time
from pathlib import Path
from svdconvert.machine import interrupts
from svdconvert.modeling import modeling_polyglot_svd  # with what it imports of transformers, which takes a second

CALLS = "open mkdir pwrite write fsync replace posix_fallocate ftruncate unlink rmdir".split()
seen, steps = [], [0]

def begin(order):
    watch(order)
    if order["interrupt"] is not None:
        interrupts.install()  # as the first thing that the program does
        interrupt_at(order["interrupt"])

def end(order):
    sys.setprofile(None)
    return {"calls": seen, "steps": steps[0]}

def watch(order):
    lock = threading.Lock()
    def wrap(name, real):
        def call(*args, **kwargs):
            if name == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kwargs)
            with lock:
                seen.append(name + " " + str(args[-1] if name == "replace" else args[0]))
                hit = len(seen) == order["at"]
            if hit and order["do"] == "kill before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if hit and order["do"] == "kill after":
                os.kill(os.getpid(), signal.SIGKILL)
            if hit and order["do"] == "wait":
                Path(order["files"] + ".reached").touch()
                while not Path(order["files"] + ".go").exists():
                    time.sleep(0.01)
            return result
        return call
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))

def interrupt_at(moment):
    # Ctrl-C between two steps of the main thread: a function is called, or returns.
    def profile(frame, event, argument):
        steps[0] += 1
        if steps[0] == moment:
            os.kill(os.getpid(), signal.SIGINT)
    sys.setprofile(profile)
"""


class Started:
    """A command that runs, in a process of its own."""

    def __init__(self, running: Running) -> None:
        self.pid, self._running = running.pid, running

    def reached(self) -> None:
        """Come back when the process waits at the call that it was to wait at."""
        for _ in range(12000):
            if Path(f"{self._running.files}.reached").exists():
                return
            time.sleep(0.01)
        raise AssertionError("the process never came to that call")

    def says(self, text: str) -> None:
        """Come back when it has said so on standard output."""
        for _ in range(6000):
            if text in Path(f"{self._running.files}.out").read_text():
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
        Path(f"{self._running.files}.go").touch()

    def wait(self) -> Ended:
        return self._running.wait()


class Zygote:
    """Starts commands. Imports stay in each of them, so that Ctrl-C comes there too."""

    def __init__(self, folder: Path) -> None:
        self._forked = Forked(folder, HOOKS, learns=False)

    def start(
        self,
        *args: object,
        at: int | None = None,
        do: str = "",
        batch: int = 1,
        interrupt: int | None = None,
        ignoring: bool = False,
    ) -> Started:
        """Start a command. ``seen`` of its end has its ``calls``, and its ``steps`` where ``interrupt`` counts them.

        Args:
            args: of the command line.
            at: the call at which something happens.
            do: ``kill before``, ``kill after`` or ``wait``.
            batch: bytes that are recorded at a time; 1 records every step by itself.
            interrupt: Ctrl-C at that step of the main thread; 0 counts them.
            ignoring: whether SIGINT is ignored when it starts.
        """
        constants = {BATCH_BYTES: batch, BATCH_SECONDS: 1e9}
        more = {"at": at, "do": do, "interrupt": interrupt, "ignoring": ignoring}
        return Started(self._forked.start(*args, constants=constants, **more))

    def run(self, *args: object, **options: Any) -> Ended:
        return self.start(*args, **options).wait()

    def close(self) -> None:
        self._forked.close()


def command(model: Path, out: Path, *options: object) -> list[object]:
    """A conversion into several files."""
    return [model, "--rank", 16, "--max-shard-size", "30KB", "--device", "cpu", "--no-check", "--out", out, *options]


def mid_job(calls: list[str]) -> int:
    """A call in the middle of the weights, after at least one file got its final name."""
    renames = [i for i, call in enumerate(calls, 1) if call.startswith("replace") and call.endswith(".safetensors")]
    return renames[0] + 9


def assert_nothing_half(folder: Path, expected: Path) -> None:
    """Every file that has its final name is whole, and config.json is there only with all the others."""
    names = {path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(".tmp")}
    for name in names:
        assert content(folder / name) == content(expected / name), name
        if name.endswith(".safetensors"):
            read_header(folder / name)
    if "config.json" in names:
        assert names == {path.name for path in expected.iterdir()}
