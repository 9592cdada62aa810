"""Jobs in threads: each once, with a state of its own; errors come out, and nothing new begins after them."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support.checkpoints import tree

from svdconvert import Calibration, InputError, convert
from svdconvert.machine.threads import in_threads, shared_cores, usual_workers


@pytest.mark.parametrize(
    ("threads", "room", "expected"),
    [(1, 100, 1), (2, 100, 2), (4, 100, 4), (16, 100, 8), (4, 3, 3), (4, 0.5, 1)],
)
def test_one_worker_a_core_as_far_as_memory_goes(
    threads: int, room: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``room``: workers that half of the free memory has room for."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("svdconvert.machine.memory.available_memory_bytes", lambda: int(2 * room * 10**9))
    assert usual_workers("cpu", lambda count: count * 10**9) == expected


@pytest.mark.parametrize(("host", "device", "expected"), [(100, 100, 2), (1, 100, 1), (100, 1, 1), (100, 2, 2)])
def test_two_workers_on_a_gpu_as_far_as_its_memory_goes(
    host: float, device: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdconvert.machine.memory.available_memory_bytes", lambda: int(2 * host * 10**9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (int(2 * device * 10**9), 10**12))
    assert usual_workers("cuda:0", lambda count: count * 10**9, lambda count: count * 10**9) == expected


def test_threads_get_a_share_of_the_cores() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        seen: list[int] = []
        with shared_cores(3):
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
        assert seen == [2]
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3])
def test_every_job_is_done_once_and_states_are_not_shared(count: int) -> None:
    states: list[list[int]] = [[] for _ in range(count)]
    busy: set[int] = set()

    def job(state: list[int], number: int) -> None:
        assert id(state) not in busy
        busy.add(id(state))
        time.sleep(0.002)
        state.append(number)
        busy.discard(id(state))

    in_threads([partial(job, number=number) for number in range(20)], states)
    assert sorted(number for state in states for number in state) == list(range(20))
    assert all(states)


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_comes_out_and_ends_it(count: int) -> None:
    done: list[int] = []

    def job(state: None, number: int) -> None:
        if number == 3:
            raise InputError("broken")
        time.sleep(0.005)
        done.append(number)

    with pytest.raises(InputError, match="broken"):
        in_threads((partial(job, number=number) for number in range(50)), [None] * count)
    assert len(done) < 6


@pytest.mark.parametrize("options", [{"method": "kfac"}, {"method": "svd", "allocation": "global"}], ids=str)
def test_decomposing_in_several_threads_changes_nothing(
    options: dict[str, str], dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    text = calibration if options["method"] == "kfac" else None
    for workers in (1, 3):
        out = tmp_path / str(workers)
        convert(dense, out, keep=0.5, calibration=text, device="cpu", workers=workers, **options)  # type: ignore[arg-type]
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
