"""Running a command and measuring it from outside: time, CPU, memory, bytes; and what it ran on.

This process must stay small: a child starts as a copy of its parent, whose size the kernel counts into the child's
peak memory. So nothing here imports torch, and whatever computes runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measured:
    """One run of a command.

    Attributes:
        wall, cpu: seconds; ``cpu`` is user and system time of all threads, ``system`` the latter part of it.
        peak_bytes: highest resident memory.
        marks: peak_bytes at the moment when a line with the given text last appeared on standard error.
        read_bytes, written_bytes: passed through system calls, whether or not they reached the disk.
        load: one-minute load average of the machine when it began, and the share of the CPU time of the whole machine
            during the run that went to others.
        output: what it wrote to standard output.
    """

    wall: float
    cpu: float
    system: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    load: float
    others: float
    marks: Mapping[str, int] = field(default_factory=dict)
    output: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the output, rounded, in JSON types."""
        return {
            "wall_s": round(self.wall, 2),
            "cpu_s": round(self.cpu, 2),
            "system_s": round(self.system, 2),
            "peak_bytes": self.peak_bytes,
            "marks": dict(self.marks),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "load": round(self.load, 2),
            "others": round(self.others, 3),
        }


def run(arguments: Sequence[str], *, threads: int = 0, marks: Sequence[str] = (), root: Path = ROOT) -> Measured:
    """Run ``python -m ...`` in the repository, so that it imports from there, and measure it.

    Args:
        arguments: what follows ``python -m``.
        threads: OMP_NUM_THREADS of the process; 0 leaves the environment as it is.
        marks: texts on standard error at whose appearance the peak memory is noted.
        root: the repository, or another checkout of it.

    Raises:
        RuntimeError: the command failed.
    """
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    load, busy, start = os.getloadavg()[0], _busy_seconds(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen: dict[str, int] = {}
    errors: list[str] = []

    def watch() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line)
            for mark in marks:
                if mark in line and mark not in seen:
                    seen[mark] = _high_water(process.pid)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read()
    watcher.join()
    # Left as a zombie until its counters are read.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wall = time.perf_counter() - start
    counters = _io_counters(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"python -m {' '.join(arguments)} failed:\n{''.join(errors[-20:])}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(
        wall=wall,
        cpu=cpu,
        system=usage.ru_stime,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        read_bytes=counters.get("rchar", 0),
        written_bytes=counters.get("wchar", 0),
        load=load,
        others=max(_busy_seconds() - busy - cpu, 0.0) / (wall * (os.cpu_count() or 1)),
        marks=seen,
        output=output,
    )


def _high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _io_counters(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def _busy_seconds() -> float:
    """CPU time that the whole machine has spent, idling and waiting aside."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    ticks = [int(value) for value in fields[:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code: no names of hosts or users."""
    cpu = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = ("torch", "numpy", "scipy", "safetensors", "transformers", "svdconvert")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.system(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "MKL_", "MALLOC_"))
        },
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in a sentence for the head of a table."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    environment = "".join(f", {name}={value}" for name, value in found["environment"].items())
    memory = f"{found['memory_bytes'] / 2**30:.0f} GiB memory"
    return f"{found['cpu']}, {found['cores']} cores, {memory}{environment}; {versions}."


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [list(heads), ["---", *["---:"] * (len(heads) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def repeated(count: int) -> str:
    """How a table's figures come from so many rounds."""
    return "one run" if count == 1 else f"median of {count}"


def save(out: Path, name: str, result: Mapping[str, Any], text: str) -> None:
    """Write ``NAME.json`` and ``NAME.md`` into a folder, and ``NAME.png`` if there is a picture; print the table."""
    # Once everything has been measured, since this makes the process large.
    from .pictures import add_picture

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    table = out / f"{name}.md"
    table.write_text(text + "\n")
    print(text)
    if line := add_picture(out, name):
        table.write_text(f"{text}\n\n{line}\n")
        print(f"\n{line}")
