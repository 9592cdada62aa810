"""How many matrices to solve at the same time, and threads that do it.

Several solvers with one thread each finish more matrices than one solver with many threads, since an
eigen-decomposition gains little from threads (docs/measurements.md). On a GPU each has its own stream.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from svdconvert.machine import interrupts

S = TypeVar("S")

# Each needs its own memory, and more than two were not measured.
MOST_WORKERS = 8

# On a GPU one decomposes while the other multiplies matrices, and while either waits for the device. Not
# measured yet.
GPU_WORKERS = 2


def usual_workers(device: str, memory: Callable[[int], int], device_memory: Callable[[int], int] | None = None) -> int:
    """Number of matrices to solve at the same time: one per core, or two on a GPU.

    At most :data:`MOST_WORKERS`, and at most as many as fit into half of the free memory.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        memory: number of workers -> peak of host memory in bytes.
        device_memory: the same for the GPU's memory.
    """
    import torch

    from svdconvert.machine.memory import available_memory_bytes

    on_gpu = torch.device(device).type == "cuda"
    most = GPU_WORKERS if on_gpu else min(torch.get_num_threads(), MOST_WORKERS)
    limits = [(memory, available_memory_bytes())]
    if on_gpu and device_memory is not None:
        limits.append((device_memory, torch.cuda.mem_get_info(device)[0]))
    counts = range(most, 1, -1)
    return next((count for count in counts if all(needs(count) <= free / 2 for needs, free in limits)), 1)


@contextmanager
def shared_cores(workers: int) -> Iterator[None]:
    """Divide the cores: threads started in this context each compute with an equal part of this thread's threads."""
    import torch

    from svdconvert.linalg import lapack

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        with lapack.threads(torch.get_num_threads()):
            yield
    finally:
        torch.set_num_threads(before)


class Worker(threading.Thread):
    """A thread that reports its own end: Python's join, once interrupted, takes a running thread for dead."""

    def __init__(self, work: Callable[[], None], name: str | None = None) -> None:
        # Daemons, so that a second Ctrl-C ends the process even inside LAPACK.
        super().__init__(name=name, daemon=True)
        self._work, self.ended = work, threading.Event()

    def run(self) -> None:
        """Do the work."""
        try:
            self._work()
        finally:
            self.ended.set()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Delay Ctrl-C until the body has finished."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_and_join(workers: Sequence[Worker], stop: Callable[[], None], last: Callable[[], None] | None = None) -> None:
    """Start threads and wait for them.

    Args:
        workers: the last one waits for the others' results.
        stop: asks all of them to end after their current job.
        last: called when all but the last one have ended.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the threads have ended.
    """
    try:
        with _interrupts_blocked():
            for worker in workers:
                worker.start()
        for worker in workers:
            if last is not None and worker is workers[-1]:
                last()
            while not worker.ended.wait(0.1):
                interrupts.check()
    except KeyboardInterrupt:
        stop()
        for worker in workers:
            worker.ended.wait()
        raise


def in_threads(jobs: Iterable[Callable[[S], None]], states: Sequence[S]) -> None:
    """Run jobs in one thread per state; with a single state, in the calling thread.

    Args:
        jobs: each is called once, with a state that no other job uses at the same time.
        states: each thread's own resources: buffers, open files.

    Raises:
        BaseException: the error of the first job that failed; running jobs finish, the others are not started.
        KeyboardInterrupt: on Ctrl-C, likewise; a second Ctrl-C does not wait for running jobs.
    """
    waiting = iter(jobs)
    with interrupts.held():
        if len(states) == 1:
            for job in waiting:
                interrupts.check()
                job(states[0])
            return
        _in_threads(waiting, states)


def _in_threads(waiting: Iterator[Callable[[S], None]], states: Sequence[S]) -> None:
    lock, errors = threading.Lock(), list[BaseException]()

    def work(state: S) -> None:
        try:
            while True:
                with lock:
                    job = None if errors else next(waiting, None)
                if job is None:
                    return
                job(state)
        except BaseException as error:  # noqa: BLE001 - carried to the calling thread, which raises it
            errors.append(error)

    with shared_cores(len(states)):
        start_and_join(
            [Worker(partial(work, state)) for state in states], stop=lambda: errors.append(KeyboardInterrupt())
        )
    if errors:
        raise errors[0]
