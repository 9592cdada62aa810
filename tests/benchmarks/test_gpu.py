"""The benchmarks for a GPU, small and on the CPU: all that is then left to be shown there is the device itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .gpu import PARTS
from .measure import ROOT


def bench(*options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tests.benchmarks.gpu", *map(str, options)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_part(part: str, tmp_path: Path) -> None:
    done = bench("--device", "cpu", "--small", "--parts", part, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["card"] == "CPU"
    assert list(result["parts"]) == [part]
    assert result["parts"][part]["lines"]
    assert part in (tmp_path / "gpu.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    done = bench("--small", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "torch sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
