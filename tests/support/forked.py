"""Commands as processes that cost milliseconds to start: one process imports everything, and each is forked from it.

What one command imports, the next one has already. A command can be killed after some time, as the out-of-memory
killer or a batch system does: SIGKILL, which no code of the process notices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = r"""
import importlib, json, os, pkgutil, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
import svdconvert
for module in pkgutil.walk_packages(svdconvert.__path__, "svdconvert."):
    if "modeling" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from svdconvert.cli import app

def child(order):
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order["files"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    for name, value in order["constants"].items():
        module, _, constant = name.rpartition(".")
        assert hasattr(sys.modules[module], constant), name
        setattr(sys.modules[module], constant, value)
    code = 70
    try:
        app.main(order["args"])
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        Path(order["files"] + ".modules").write_text("\n".join(sorted(sys.modules)))
    # as at the end of a process of its own: wait for threads that are not daemons
    threading._shutdown()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    start = time.perf_counter()
    if (pid := os.fork()) == 0:
        child(order)
    if order["kill"] is not None:
        time.sleep(order["kill"])
        os.kill(pid, signal.SIGKILL)  # it is not reaped yet, so that the number is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = time.perf_counter() - start
    with suppress(OSError):
        for name in Path(order["files"] + ".modules").read_text().splitlines():
            if name not in sys.modules and name.partition(".")[0] in order["packages"]:
                with suppress(Exception):
                    importlib.import_module(name)
    print(status, seconds, flush=True)
"""

PACKAGES = "svdconvert transformers tokenizers safetensors scipy torch rich numpy threadpoolctl".split()


@dataclass(frozen=True)
class Ended:
    """Exit status (negative: the signal that killed it), seconds and output of a command."""

    status: int
    seconds: float
    out: str
    err: str


class Forked:
    """Starts commands, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Import everything; the outputs of commands go into the folder."""
        self._folder, self._count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, *args: object, kill: float | None = None, constants: Mapping[str, Any] | None = None) -> Ended:
        """Run a command to its end.

        Args:
            args: of the command line.
            kill: seconds after which it is killed, unless it has ended.
            constants: values of modules' constants, by their full names.
        """
        self._count += 1
        files = str(self._folder / str(self._count))
        order = {"args": [str(arg) for arg in args], "files": files, "kill": kill, "packages": PACKAGES}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order | {"constants": dict(constants or {})}) + "\n")
        self._process.stdin.flush()
        status, seconds = self._process.stdout.readline().split()
        texts = [Path(f"{files}.{name}") for name in ("out", "err")]
        out, err = (path.read_text() if path.exists() else "" for path in texts)
        return Ended(int(status), float(seconds), out, err)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
