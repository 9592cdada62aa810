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
    """What a stage took.

    Attributes:
        wall_seconds: without waiting for other stages; those of several workers add up.
        cpu_seconds: of its threads.
        workers: how many it had, or None where that is not known.
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

    def stages(self, **workers: int) -> dict[str, StageTime]:
        """What each stage has taken so far.

        Args:
            workers: stage -> how many it had, of those where that is known.
        """
        return {stage: StageTime(wall, cpu, workers.get(stage)) for stage, (wall, cpu) in self._seconds.items()}
