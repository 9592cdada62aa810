"""The threads of one job, which stop together: where one fails, or the user interrupts, the others leave quietly."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from svdconvert.machine.threads import Worker

T = TypeVar("T")

# Seconds after which a thread that waits for another one sees whether there is anything to wait for.
_POLL = 0.2


class Stopped(Exception):
    """Another thread failed or the user interrupted: leave quietly."""


class Crew:
    """Threads that hand work on through queues.

    Attributes:
        error: what the first thread that failed raised, or None.
    """

    def __init__(self) -> None:
        """Nobody is at work yet."""
        self.error: BaseException | None = None
        self._stop = threading.Event()

    def thread(self, work: Callable[[], None], name: str) -> Worker:
        """A thread of the crew, not started yet."""
        return Worker(partial(self._guard, work), name)

    def stop(self) -> None:
        """Make every thread leave after what it has in hand."""
        self._stop.set()

    def put(self, where: queue.Queue[T], item: T) -> None:
        """Hand something on, when there is room for it.

        Raises:
            Stopped: the crew has been stopped.
        """
        while not self._stop.is_set():
            try:
                return where.put(item, timeout=_POLL)
            except queue.Full:
                continue
        raise Stopped

    def get(self, where: queue.Queue[T]) -> T:
        """Take the next thing, when it comes. Raises as :meth:`put`."""
        while not self._stop.is_set():
            try:
                return where.get(timeout=_POLL)
            except queue.Empty:
                continue
        raise Stopped

    def acquire(self, semaphore: threading.Semaphore) -> None:
        """Wait for a semaphore. Raises as :meth:`put`."""
        while not semaphore.acquire(timeout=_POLL):
            if self._stop.is_set():
                raise Stopped

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            self.error = self.error or error
            self.stop()
