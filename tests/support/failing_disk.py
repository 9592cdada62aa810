"""Commands on a file system that fails: ``failing_disk.c`` stands before the system calls of their processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.forked import BATCH_BYTES, BATCH_SECONDS, Ended, Forked

SOURCE = Path(__file__).with_name("failing_disk.c")
KINDS = "open write pwrite fsync rename ftruncate fallocate close mkdir unlink rmdir".split()

HOOKS = r"""
import ctypes, os
disk = ctypes.CDLL(LIBRARY)

def begin(order):
    disk.fault_lacks(order["lacks"].encode())
    fault = order["fault"]
    path, kind, what = order["prefix"].encode(), fault["kind"].encode(), fault["what"].encode()
    disk.fault_set(path, kind, ctypes.c_long(fault["at"]), what, fault["error"])
    os.umask(order["umask"])

def end(order):
    counts = {kind: disk.fault_count(kind.encode()) for kind in KINDS}
    disk.fault_set(b"", b"", ctypes.c_long(0), b"", 0)
    return counts
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


class FailingDisk:
    """Starts commands."""

    def __init__(self, folder: Path, library: Path) -> None:
        hooks = f"LIBRARY, KINDS = {str(library)!r}, {KINDS!r}\n{HOOKS}"
        self._forked = Forked(folder, hooks, environment={"LD_PRELOAD": str(library)})

    def run(
        self, args: list[object], prefix: Path, fault: Fault | None = None, *, lacks: str = "", umask: int = 0o022
    ) -> Ended:
        """Run a command to its end, every step recorded by itself. ``seen`` counts its calls by kind.

        Args:
            args: of the command line.
            prefix: begin of the paths that are looked at.
            fault: what goes wrong.
            lacks: features that the file system does not have.
            umask: of the process.
        """
        more = {"prefix": str(prefix), "fault": vars(fault or Fault()), "lacks": lacks, "umask": umask}
        return self._forked.run(*args, constants={BATCH_BYTES: 1, BATCH_SECONDS: 1e9}, **more)

    def close(self) -> None:
        self._forked.close()
