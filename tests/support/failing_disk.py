"""Commands on a file system that fails: ``failing_disk.c`` stands before the system calls of a process of its own.

Importing torch costs seconds and forking milliseconds: one process imports everything, and each command is forked from
it, with the fault that it is told.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("failing_disk.c")
KINDS = "open write pwrite fsync rename ftruncate fallocate close mkdir unlink rmdir".split()

SERVER = r"""
import ctypes, importlib, json, os, sys, threading
from contextlib import suppress
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
from svdconvert.cli import app
disk = ctypes.CDLL(sys.argv[1])
KINDS = sys.argv[2].split()

def child(order):
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order["files"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    from svdconvert.jobs import shard_writer
    shard_writer.BATCH_BYTES, shard_writer.BATCH_SECONDS = order["batch"], 1e9
    disk.fault_lacks(order["lacks"].encode())
    fault = order["fault"]
    path, kind, what = order["prefix"].encode(), fault["kind"].encode(), fault["what"].encode()
    disk.fault_set(path, kind, ctypes.c_long(fault["at"]), what, fault["error"])
    os.umask(order["umask"])
    code = 70
    try:
        app.main(order["args"])
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        counts = {kind: disk.fault_count(kind.encode()) for kind in KINDS}
        disk.fault_set(b"", b"", ctypes.c_long(0), b"", 0)
        seen = {"counts": counts, "modules": sorted(sys.modules)}
        Path(order["files"] + ".seen").write_text(json.dumps(seen))
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if (pid := os.fork()) == 0:
        child(order)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        # What one command imports, the next has already.
        for name in json.loads(Path(order["files"] + ".seen").read_text())["modules"]:
            if name not in sys.modules and name.partition(".")[0] in order["packages"]:
                with suppress(Exception):
                    importlib.import_module(name)
    print(status, flush=True)
"""


def compiled(folder: Path) -> Path:
    """The library, built by the system's compiler or by the one of the package ziglang."""
    library = folder / "failing_disk.so"
    system = shutil.which("cc")
    compiler = [system] if system else [sys.executable, "-m", "ziglang", "cc"]
    line = [*compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


@dataclass(frozen=True)
class Fault:
    """What goes wrong: the call ``at`` of a kind; see ``failing_disk.c`` for what may happen to it."""

    kind: str = ""
    at: int = 0
    what: str = "fail"
    error: int = 5  # EIO


@dataclass(frozen=True)
class Ended:
    """Exit status (negative: the signal that killed it), output, and how many calls of each kind there were."""

    status: int
    out: str
    err: str
    counts: Mapping[str, int]


class FailingDisk:
    """Starts commands."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._folder, self._count = folder, 0
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(library), " ".join(KINDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(
        self,
        args: list[object],
        prefix: Path,
        fault: Fault | None = None,
        *,
        lacks: str = "",
        umask: int = 0o022,
        batch: int = 1,
    ) -> Ended:
        """Run a command to its end.

        Args:
            args: of the command line.
            prefix: begin of the paths that are looked at.
            fault: what goes wrong.
            lacks: features that the file system does not have.
            umask: of the process.
            batch: bytes that are recorded at a time; 1 records every step by itself.
        """
        self._count += 1
        files = str(self._folder / str(self._count))
        order: dict[str, Any] = {"args": [str(arg) for arg in args], "files": files, "prefix": str(prefix)}
        order |= {"fault": vars(fault or Fault()), "lacks": lacks, "umask": umask, "batch": batch}
        order["packages"] = [
            "svdconvert",
            "transformers",
            "tokenizers",
            "safetensors",
            "scipy",
            "torch",
            "rich",
            "numpy",
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        seen = Path(f"{files}.seen")
        counts = json.loads(seen.read_text())["counts"] if seen.exists() else {}
        out, err = (Path(f"{files}.{name}").read_text() for name in ("out", "err"))
        return Ended(status, out, err, counts)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
