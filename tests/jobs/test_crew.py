"""Threads of one job: what one raises ends all, and is what the job raises."""

from __future__ import annotations

import queue
import threading

import pytest

from svdconvert import JobError
from svdconvert.jobs.crew import Crew, Stopped


def test_an_error_in_one_thread_stops_the_others() -> None:
    crew, full, empty = Crew(), queue.Queue[int](maxsize=1), queue.Queue[int]()
    full.put(0)
    taken = threading.Semaphore(0)
    error = JobError("the disk is full")

    def fail() -> None:
        raise error

    waiting = [
        crew.thread(lambda: crew.put(full, 1), "put"),
        crew.thread(lambda: print(crew.get(empty)), "get"),
        crew.thread(lambda: crew.acquire(taken), "acquire"),
    ]
    for thread in waiting:
        thread.start()
    assert not any(thread.ended.wait(0.05) for thread in waiting)
    failing = crew.thread(fail, "fail")
    failing.start()
    assert all(thread.ended.wait(60) for thread in (failing, *waiting))
    assert crew.error is error


def test_stopping_is_no_error() -> None:
    crew = Crew()
    crew.stop()
    with pytest.raises(Stopped):
        crew.get(queue.Queue[int]())
    thread = crew.thread(lambda: print(crew.get(queue.Queue[int]())), "get")
    thread.start()
    assert thread.ended.wait(60)
    assert crew.error is None
