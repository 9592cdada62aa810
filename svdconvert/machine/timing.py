"""Where a job's time goes: wall and CPU seconds of its stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageTime:
    """The time that a stage took.

    Attributes:
        wall_seconds: time spent working, without waiting for other stages, summed over workers.
        cpu_seconds: CPU time of its threads.
        workers: number of its workers, or None where it is unknown.
    """

    wall_seconds: float
    cpu_seconds: float
    workers: int | None = None

    def to_json(self) -> dict[str, Any]:
        """``wall_seconds`` and ``cpu_seconds`` in milliseconds' precision, and ``workers`` where that is known."""
        seconds = {"wall_seconds": round(self.wall_seconds, 3), "cpu_seconds": round(max(self.cpu_seconds, 0.0), 3)}
        return seconds if self.workers is None else {**seconds, "workers": self.workers}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StageTime:
        """What :meth:`to_json` gave."""
        return cls(document["wall_seconds"], document["cpu_seconds"], document.get("workers"))


class StageTimes:
    """Seconds of work by stage, summed over threads; time spent waiting for another thread does not count."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._lock = threading.Lock()
        self._seconds: dict[str, list[float]] = {}

    @contextmanager
    def measure(self, stage: str, *, process: bool = False) -> Iterator[None]:
        """Measure the body.

        Args:
            stage: its name.
            process: measure the CPU time of all threads of the process, not only of the calling one.
        """
        clock = time.process_time if process else time.thread_time
        wall, cpu = time.perf_counter(), clock()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - wall, clock() - cpu)

    def add(self, stage: str, wall: float, cpu: float) -> None:
        """Add seconds to a stage."""
        with self._lock:
            total = self._seconds.setdefault(stage, [0.0, 0.0])
            total[0] += wall
            total[1] += cpu

    def cpu(self, *stages: str) -> float:
        """CPU seconds of some stages, summed."""
        return sum(self._seconds[stage][1] for stage in stages if stage in self._seconds)

    def stages(self, **workers: int) -> dict[str, StageTime]:
        """What each stage has taken so far.

        Args:
            workers: stage -> number of its workers, where it is known.
        """
        return {stage: StageTime(wall, cpu, workers.get(stage)) for stage, (wall, cpu) in self._seconds.items()}
