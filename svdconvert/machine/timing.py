"""Where a job's time goes: wall and CPU seconds of its stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimes:
    """Seconds of work by stage, added up over threads; what a thread waits for another one does not count."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._lock = threading.Lock()
        self._seconds: dict[str, list[float]] = {}

    @contextmanager
    def measure(self, stage: str, *, process: bool = False) -> Iterator[None]:
        """Count what is done inside.

        Args:
            stage: its name.
            process: count the CPU time of all threads of the process and not only of the calling one.
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
        """CPU seconds of some stages together."""
        return sum(self._seconds[stage][1] for stage in stages if stage in self._seconds)

    def to_json(self) -> dict[str, dict[str, float]]:
        """Stage -> ``wall_seconds`` and ``cpu_seconds``."""
        return {
            stage: {"wall_seconds": round(wall, 3), "cpu_seconds": round(max(cpu, 0.0), 3)}
            for stage, (wall, cpu) in self._seconds.items()
        }
