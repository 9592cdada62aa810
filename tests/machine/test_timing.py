"""Where the time of a job goes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from svdconvert.machine.timing import StageTimes


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_waiting_is_wall_time_and_work_is_both() -> None:
    times = StageTimes()
    with times.measure("read"):
        time.sleep(0.05)
    with times.measure("write"):
        spin(0.05)
    found = times.stages()
    assert list(found) == ["read", "write"]
    assert found["read"].wall_seconds >= 0.05 > 10 * found["read"].cpu_seconds
    assert found["write"].wall_seconds >= found["write"].cpu_seconds - 0.002
    assert found["write"].cpu_seconds >= 0.05
    assert times.cpu("read", "write", "none") >= 0.05


def test_threads_add_up_and_do_not_count_each_other() -> None:
    times = StageTimes()

    def work() -> None:
        with times.measure("solve"):
            spin(0.05)

    threads = [threading.Thread(target=work) for _ in range(3)]
    with times.measure("idle"), times.measure("all", process=True):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = times.stages()
    assert found["solve"].cpu_seconds >= 0.15
    assert found["all"].cpu_seconds >= 0.15
    assert found["idle"].cpu_seconds < 0.05


def test_a_stage_that_fails_is_counted() -> None:
    times = StageTimes()
    try:
        with times.measure("read"):
            spin(0.01)
            raise OSError
    except OSError:
        pass
    assert times.cpu("read") >= 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps no such figure")
def test_peak_memory_is_not_that_of_the_process_before() -> None:
    ours = "from svdconvert.machine.memory import peak_memory_bytes; print(peak_memory_bytes())"
    theirs = f"import subprocess, sys; kept = b'1' * 400_000_000; subprocess.run([sys.executable, '-c', {ours!r}])"
    done = subprocess.run([sys.executable, "-c", theirs], check=True, capture_output=True, text=True)
    assert 5_000_000 < int(done.stdout) < 200_000_000


def test_a_conversion_says_where_its_time_went(
    dense: Path, run: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    result = run(dense, "--rank", 16, "--device", "cpu", "--workers", 2, "--out", tmp_path / "out")
    assert result.code == 0, result
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    (stages,) = record["timing"]
    assert list(stages) == ["prepare", "read", "solve", "write"]
    solver = sum(matrix["seconds"] for matrix in record["matrices"].values())
    assert abs(stages["solve"]["wall_seconds"] - solver) < 0.01
    assert stages["write"]["wall_seconds"] > 0
    table = re.search(r"^stages +(.+)$", result.out, re.MULTILINE)
    for stage, spent in stages.items():
        if max(spent["wall_seconds"], spent["cpu_seconds"]) < 0.05:
            continue
        assert table is not None
        workers = " in 2 workers" if stage == "solve" else ""
        assert f"{stage} {spent['wall_seconds']:.1f} s{workers} (CPU {spent['cpu_seconds']:.1f} s)" in table[1]
