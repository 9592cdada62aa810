"""Several processes, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def torchrun(count: int, *command: object) -> SimpleNamespace:
    """Start ``count`` processes and wait for them. torchrun chooses the port and keeps it: nobody else can take it."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    done = subprocess.run(
        [*map(str, line), *map(str, command)], capture_output=True, text=True, env=environment(), check=False
    )
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
