"""Commands as processes that cost milliseconds to start: one process imports everything, and each is forked from it.

What one command imports, the next one has already. A command can be killed after some time, as the out-of-memory
killer or a batch system does: SIGKILL, which no code of the process notices. What else happens to a command, such as
faults of the disk, is up to hooks that run in its process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SERVER = r"""
import importlib, json, os, pkgutil, signal, sys, threading
from contextlib import suppress
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
import svdconvert
for module in pkgutil.walk_packages(svdconvert.__path__, "svdconvert."):
    if "modeling" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from svdconvert import program
if "LD_PRELOAD" not in os.environ:  # where nobody stands before the system's calls
    from support.durable import sync_nothing
    os.fsync = sync_nothing
hooks = {"begin": lambda order: None, "end": lambda order: {}}
exec(sys.argv[1], hooks)
from support.settled import settle
settle()

def child(order):
    # As from a terminal, whatever the process that runs the tests does with SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_IGN if order["ignoring"] else signal.default_int_handler)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order["files"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for name, value in order["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(sys.modules[module], constant), name
        setattr(sys.modules[module], constant, value)
    code, sys.argv = 70, ["svdconvert", *order["args"]]
    try:
        hooks["begin"](order)
        program.run()
    except SystemExit as end:
        code = end.code or 0
    finally:
        seen = hooks["end"](order)
        sys.stdout.flush(), sys.stderr.flush()
        # whole or not at all: a process may be killed here, too
        part = Path(order["files"] + ".seen.part")
        part.write_text(json.dumps(seen))
        part.replace(order["files"] + ".seen")
        Path(order["files"] + ".modules").write_text("\n".join(sorted(sys.modules)))
    # As at the end of a process of its own: wait for threads that are not daemons.
    threading._shutdown()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" not in order:
        if (pid := os.fork()) == 0:
            child(order)
        print(pid, flush=True)
        continue
    print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
    with suppress(OSError):
        for name in Path(order["files"] + ".modules").read_text().splitlines():
            if name not in sys.modules and name.partition(".")[0] in order["packages"]:
                with suppress(Exception):
                    importlib.import_module(name)
"""

TESTS = Path(__file__).parents[1]
PACKAGES = "svdconvert transformers tokenizers safetensors scipy torch rich numpy threadpoolctl".split()
BATCH_BYTES = "svdconvert.jobs.shard_writer.BATCH_BYTES"
BATCH_SECONDS = "svdconvert.jobs.shard_writer.BATCH_SECONDS"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status; negative: the signal that killed it.
        seconds: how long it took.
        out, err: its output.
        seen: what the hook ``end`` returned; empty where the process was killed.
    """

    status: int
    seconds: float
    out: str
    err: str
    seen: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Running:
    """A command that runs, in a process of its own."""

    def __init__(self, server: Forked, pid: int, files: str) -> None:
        self.pid, self.files, self._server, self._start = pid, files, server, time.perf_counter()

    def kill(self) -> None:
        """SIGKILL. As it is not reaped yet, the number is still its own."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for its end."""
        status = self._server.ask({"wait": self.pid, "files": self.files, "packages": self._server.packages})
        seconds = time.perf_counter() - self._start
        # A process that was killed at once has opened neither.
        texts = [Path(f"{self.files}.{name}") for name in ("out", "err")]
        out, err = (path.read_text() if path.exists() else "" for path in texts)
        seen = Path(f"{self.files}.seen")
        return Ended(status, seconds, out, err, json.loads(seen.read_text()) if seen.exists() else {})


class Forked:
    """Starts commands."""

    def __init__(
        self, folder: Path, hooks: str = "", *, learns: bool = True, environment: Mapping[str, str] | None = None
    ) -> None:
        """Import everything.

        Args:
            folder: for the outputs of commands.
            hooks: Python that may define ``begin(order)``, which runs in a command's process before the command, and
                ``end(order)``, which runs after it and returns what JSON can hold.
            learns: what one command imports is imported for the next ones.
            environment: variables on top of those of this process.
        """
        self.folder, self._count, self.packages = folder, 0, PACKAGES if learns else []
        # A process that is killed leaves its temporary files in the tests' own folder.
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(folder)}
        variables |= environment or {}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), variables.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, hooks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, order: Mapping[str, Any]) -> int:
        """Send an order; returns the number that comes back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self, *args: object, constants: Mapping[str, Any] | None = None, ignoring: bool = False, **more: Any
    ) -> Running:
        """Start a command.

        Args:
            args: of the command line.
            constants: values of modules' constants, by their full names.
            ignoring: whether SIGINT is ignored when it starts.
            more: for the hooks.
        """
        self._count += 1
        files = str(self.folder / str(self._count))
        order = {"args": [str(arg) for arg in args], "files": files, "constants": dict(constants or {})}
        return Running(self, self.ask({**order, "ignoring": ignoring, **more}), files)

    def run(self, *args: object, kill: float | None = None, **options: Any) -> Ended:
        """Run a command to its end, or kill it after so many seconds unless it has ended; the rest as of `start`."""
        running = self.start(*args, **options)
        if kill is not None:
            time.sleep(kill)
            running.kill()
        return running.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
