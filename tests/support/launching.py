"""Several processes: as torchrun starts them, and forked ones that torch.distributed joins, which cost far less."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.forked import Ended, Forked

# The variables that torchrun sets. ``dies``: a kind of call that changes the disk, and at which of them the process
# kills itself; ``program``: a script in place of the command line.
HOOKS = r"""
import os, runpy, signal, sys

def begin(order):
    os.environ.update(order.get("environment", {}))
    if order.get("dies"):
        die(*order["dies"])
    if order.get("program"):
        sys.argv[0] = order["program"]
        runpy.run_path(order["program"], run_name="__main__")
        sys.exit(0)

def end(order):
    return {}

def die(call, at):
    real, seen = getattr(os, call), []
    def dying(*args, **kwargs):
        seen.append(args)
        if len(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, call, dying)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def torchrun(count: int, *command: object) -> SimpleNamespace:
    """Start ``count`` processes and wait for them. torchrun chooses the port and keeps it: nobody else can take it."""
    with tempfile.TemporaryDirectory() as logs:  # it removes none of its own
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        done = subprocess.run(
            [*map(str, line), "--log-dir", logs, *map(str, command)],
            capture_output=True,
            text=True,
            env=environment(),
            check=False,
        )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(forked: Forked, count: int, *args: object, victim: int = -1, dies: Any = 0, **more: Any) -> list[Ended]:
    """A command in so many processes, the leader's end first; where one is to die, its end.

    Args:
        forked: starts them, with the hooks of this module or such as know ``environment`` and ``dies``.
        count: how many.
        args: of the command line.
        victim: the rank of the process that dies.
        dies: for the hooks of that one, where it does.
        more: see :meth:`support.forked.Forked.start`.
    """
    port = str(free_port())
    started = []
    for rank in range(count):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        variables = {name: str(value) for name, value in names.items()}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(forked.start(*args, environment=variables, dies=dies if rank == victim else 0, **more))
    if victim >= 0:  # as torchrun ends the others
        ended = started[victim].wait()
        for rank, running in enumerate(started):
            if rank != victim:
                running.kill()
        return [ended, *(running.wait() for rank, running in enumerate(started) if rank != victim)]
    return [running.wait() for running in started]


def launcher(folder: Path) -> Forked:
    """Starts commands for :func:`together`."""
    return Forked(folder, HOOKS)
