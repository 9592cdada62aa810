"""Progress without a terminal: a line at least every 30 seconds of work, with the time that is left."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from svdconvert import Calibration, ablate, calibrate, convert, sweep
from svdconvert.cli import progress
from svdconvert.cli.progress import Lines, TerminalEvents, counting, duration
from svdconvert.planning.steps import Step


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Slow(TerminalEvents):
    """Everything that is told comes four seconds after what was told before."""

    def __init__(self) -> None:
        self.stream, self.clock = io.StringIO(), Clock()
        self.printed: list[float] = [self.clock.now]
        self.phases: list[str] = []
        super().__init__(Console(file=self.stream, width=140), clock=self.clock)

    def _wait(self) -> None:
        self.clock.now += 4

    def solving(self, step: Step) -> None:
        self._wait()
        super().solving(step)

    def decomposed(self, step: Step) -> None:
        self._wait()
        super().decomposed(step)

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        self._wait()
        super().solved(step, report)

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self._wait()
        if phase not in self.phases:
            self.phases.append(phase)
        super().progress(phase, done, total, detail)

    def _print(self, text: str) -> None:
        if " so far" in text:
            self.printed.append(self.clock.now)
        super()._print(text)

    def check(self) -> str:
        """No 30 seconds without a line."""
        gaps = [
            later - earlier for earlier, later in zip(self.printed, [*self.printed[1:], self.clock.now], strict=True)
        ]
        assert max(gaps) <= 30, gaps
        assert len(self.printed) > 3
        return self.stream.getvalue()


def test_a_calibrated_conversion(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Reading, both passes, the head, decomposing, refitting, factors, losses and the check of the result."""
    with Slow() as events:
        convert(
            dense, tmp_path / "out", keep=0.6, calibration=calibration, refit="sequential", device="cpu", events=events
        )
    shown = events.check()
    assert set(events.phases) >= {
        "embedding",
        "forward",
        "head",
        "backward",
        "refit",
        "measuring",
        "checking the result",
    }
    assert re.search(r"^forward, block \d of 3: \d+ of 15, \d+ s so far, about .* left$", shown, re.MULTILINE)
    assert re.search(r"^backward, block \d of 3: \d+ of 15, .* left$", shown, re.MULTILINE)


def test_calibrate(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    with Slow() as events:
        calibrate(dense, calibration, tmp_path / "stats", device="cpu", events=events)
    events.check()
    assert events.phases == ["embedding", "forward", "head", "backward"]


def test_plain_conversion(dense: Path, tmp_path: Path) -> None:
    with Slow() as events:
        convert(dense, tmp_path / "out", rank=16, device="cpu", events=events)
    assert re.search(r"^factors: \d+ of 12, .* so far, about .* left$", events.check(), re.MULTILINE)


def test_ablate(dense: Path, text: Path) -> None:
    with Slow() as events:
        ablate(dense, text, groups=3, window=32, batch_size=2, device="cpu", events=events)
    assert re.search(r"^tokens: [\d,]+ of [\d,]+, .* left$", events.check(), re.MULTILINE)


def test_sweep(dense: Path, text: Path, tmp_path: Path) -> None:
    with Slow() as events:
        sweep(
            dense, text, tmp_path / "out", keep=[0.5], window=32, batch_size=2, plot=False, device="cpu", events=events
        )
    assert re.search(r"^tokens: [\d,]+ of [\d,]+, .* left$", events.check(), re.MULTILINE)


def test_work_that_tells_nothing_is_told_of_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread looks at the clock, so a matrix that takes minutes, or a library's own work, is not silent."""
    clock, stream, before = Clock(), io.StringIO(), threading.active_count()
    monkeypatch.setattr(progress, "POLL", 0.001)
    with TerminalEvents(Console(file=stream, width=140), clock=clock) as events:
        events.progress("checking the result", 0, 0)
        for count in range(1, 4):
            clock.now += 30
            deadline = time.monotonic() + 60
            while stream.getvalue().count("\n") < count and time.monotonic() < deadline:
                time.sleep(0.001)
    lines = stream.getvalue().splitlines()
    assert lines == [f"checking the result: {duration(30 * count)} so far" for count in (1, 2, 3)]
    assert threading.active_count() == before


def test_the_time_left_is_that_of_the_phase() -> None:
    clock, shown = Clock(), list[str]()
    lines = Lines(shown.append, clock)
    clock.now += 29
    lines.tick()
    lines.at("forward", 0, 100, "block 1 of 10")
    clock.now += 60
    lines.at("forward", 10, 100, "block 2 of 10")
    clock.now += 10
    lines.at("forward", 11, 100, "block 2 of 10")  # too early for another line
    clock.now += 600
    lines.at("backward", 40, 100)  # an earlier run did 40
    clock.now += 30
    lines.at("backward", 50, 100)
    assert shown == [
        "preparing: 29 s so far",
        "forward, block 2 of 10: 10 of 100, 1 min 0 s so far, about 9 min 0 s left",
        "backward: 40 of 100, 0 s so far",
        "backward: 50 of 100, 30 s so far, about 2 min 30 s left",
    ]


def test_a_matrix_counts_only_where_matrices_are_counted() -> None:
    """Those of a block are decomposed amid a pass over the model, which counts batches."""
    clock, stream = Clock(), io.StringIO()
    events, step = (
        TerminalEvents(Console(file=stream, width=140), clock=clock),
        Step("decompose", "layers.0.dense", (), ()),
    )
    events.begin([step] * 4, 0)
    events.decomposed(step)
    clock.now += 30
    events.decomposed(step)
    events.progress("backward", 12, 12)
    clock.now += 30
    events.decomposed(step)
    assert stream.getvalue().splitlines() == [
        "decomposing: 2 of 4, 30 s so far, about 30 s left",
        "backward: 12 of 12, 30 s so far",
    ]


def test_counting_in_a_pipe_and_in_a_terminal() -> None:
    stream = io.StringIO()
    with counting(Console(file=stream, width=140), "tokens") as tell:
        tell(5, 10)
    assert stream.getvalue() == ""
    stream = io.StringIO()
    with counting(Console(file=stream, width=140, force_terminal=True), "tokens") as tell:
        tell(5, 10)
    assert "tokens" in stream.getvalue()
    assert "5/10" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[1A\x1b[2K"), "the bar is removed"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
