"""Folders that last as long as the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE = "import os; from svdconvert.machine.interrupts import end, lasting_folder; print(lasting_folder(), flush=True); "
ENDS = {"normally": ("pass", 0), "with an error": ("1 / 0", 1), "as after Ctrl-C": ("end()", 1)}


@pytest.mark.parametrize("ending", ENDS)
def test_removed_at_the_end(ending: str) -> None:
    code, status = ENDS[ending]
    done = subprocess.run([sys.executable, "-c", MAKE + code], capture_output=True, text=True)
    assert done.returncode == status
    assert not Path(done.stdout.strip()).exists()


def test_left_alone_by_a_fork() -> None:
    """A child that ends does not take its parent's folder away."""
    folder = "folder = lasting_folder(); pid = os.fork(); pid or exit(); os.waitpid(pid, 0); print(folder.is_dir())"
    done = subprocess.run([sys.executable, "-c", MAKE + folder], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "True", done.stderr
