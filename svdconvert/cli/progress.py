"""Progress of a job: a bar on a terminal; elsewhere a line now and then, with the time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from svdconvert.cli.report import show_plan
from svdconvert.machine import interrupts
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step
from svdconvert.sentences import printable
from svdconvert.settings.told import told
from svdconvert.words import numbered, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from svdconvert.planning.plan import Plan

# Seconds between lines without a terminal: at most 30, even where the thread wakes up late.
LINE_EVERY = 25.0
# Seconds between looks at the clock.
POLL = 1.0


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Phase:
    """A part of the work that is counted.

    Attributes:
        name: the name shown.
        done, total: units of work; a total of 0 means unknown.
        detail: the present place in it.
    """

    def __init__(self, name: str, done: int, total: int, now: float) -> None:
        self.name, self.done, self.total, self.detail = name, done, total, ""
        self._start, self._first = now, done

    def left(self, now: float) -> float | None:
        """Seconds until its end at the speed so far; None if unknown."""
        new = self.done - self._first
        return (now - self._start) / new * (self.total - self.done) if new > 0 and self.done < self.total else None

    def line(self, now: float) -> str:
        """``forward, block 3 of 30: 72 of 720, 3 min 20 s so far, about 30 min 0 s left``."""
        parts = [f"{self.done:,} of {self.total:,}"] if self.total else []
        parts.append(f"{duration(now - self._start)} so far")
        if (left := self.left(now)) is not None:
            parts.append(f"about {duration(left)} left")
        return f"{self.name}{f', {self.detail}' if self.detail else ''}: {', '.join(parts)}"


class Lines:
    """A line about the current phase, :data:`LINE_EVERY` seconds after the last one."""

    def __init__(self, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is shown at first.

        Args:
            show: prints a line.
            clock: seconds.
        """
        self._show, self._clock, self._lock = show, clock, threading.Lock()
        self._last = clock()
        self.phase = Phase("preparing", 0, 0, self._last)

    def at(self, name: str, done: int, total: int, detail: str = "") -> None:
        """Record progress of a phase; another name begins another phase."""
        with self._lock:
            if (name, total) != (self.phase.name, self.phase.total):
                self.phase = Phase(name, done, total, self._clock())
            self.phase.done, self.phase.detail = done, detail
        self.tick()

    def step(self) -> None:
        """Record one more unit."""
        with self._lock:
            self.phase.done += 1
        self.tick()

    def tick(self) -> None:
        """Show a line if it is time for one."""
        with self._lock:
            now = self._clock()
            if now - self._last < LINE_EVERY:
                return
            self._last = now
            line = self.phase.line(now)
        self._show(line)


class TerminalEvents(Events):
    """Progress of a job: a bar with the current matrix on a terminal; else a line per weight file, and now and then."""

    def __init__(self, console: Console, *, verbose: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Show on this console; ``verbose`` adds a line per matrix."""
        self._console = console
        self._verbose = verbose
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[current]}", markup=False),
            console=console,
            # A matrix can take a minute; the default window forgets the speed in between.
            speed_estimate_period=600,
            disable=not console.is_terminal,
            transient=True,  # what it counted is over
        )
        self._task = self._progress.add_task("", total=None, current="", start=False)
        self._shown: tuple[str, int] | None = None
        # Whether matrices are what the phase counts: those of a block are decomposed amid a pass over the model.
        self._matrices = False
        self._lines = None if console.is_terminal else Lines(self._print, clock)
        self._ended = threading.Event()
        self._clockwork: threading.Thread | None = None

    def __enter__(self) -> TerminalEvents:
        """Nothing is drawn before there is something to count."""
        if self._lines is not None:
            # Phases that report no progress get lines too.
            self._clockwork = threading.Thread(target=self._tick, args=(self._lines,), daemon=True)
            self._clockwork.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._ended.set()
        if self._clockwork is not None:
            self._clockwork.join()
        self._progress.stop()

    def _tick(self, lines: Lines) -> None:
        while not self._ended.wait(POLL):
            lines.tick()

    def planned(self, plan: Plan, free: int) -> None:
        show_plan(self._console, plan, free)

    def begin(self, steps: Sequence[Step], done_before: int) -> None:
        if done_before and not steps:
            self.note(f"what an earlier run did of {numbered(done_before, 'matrix', 'matrices')} is used again")
        elif done_before:
            done = f"{numbered(done_before, 'matrix was', 'matrices were')} done by an earlier run"
            self.note(f"{done}; continuing with {len(steps)}")
        what = "decomposing" if any(step.kind == "decompose" for step in steps) else "factors"
        self._shown, self._matrices = None, True
        self._at(what, done_before, len(steps) + done_before, "")

    def solving(self, step: Step) -> None:
        interrupts.check()
        if self._lines is not None:
            self._lines.tick()
        else:
            self._progress.update(self._task, current=printable(step.key))

    def decomposed(self, step: Step) -> None:
        self._advance()

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        self._advance()
        if not self._verbose:
            return
        parts = [step.key, f"rank {report['rank']}" if "rank" in report else step.kind]
        known = {name: report[name] for name in ("energy_kept", "relative_error") if name in report}
        parts += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in known.items()]
        self._print(", ".join([*parts, f"{report['seconds']:.2f} s"]))

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        interrupts.check()
        self._matrices = False
        self._at(phase, done, total, detail)

    def shard(self, name: str, size_in_bytes: int) -> None:
        self._print(f"wrote {name} ({size(size_in_bytes)})")

    def note(self, text: str) -> None:
        self._print(f"note: {told(text)}")

    def _at(self, phase: str, done: int, total: int, detail: str) -> None:
        if self._lines is not None:
            self._lines.at(phase, done, total, detail)
            return
        if self._shown != (phase, total):  # another phase has another speed
            self._shown = (phase, total)
            self._progress.reset(self._task, description=phase, total=total or None, completed=done, current=detail)
            self._progress.start()
        self._progress.update(self._task, completed=done, current=detail)

    def _advance(self) -> None:
        if not self._matrices:
            if self._lines is not None:
                self._lines.tick()
        elif self._lines is not None:
            self._lines.step()
        else:
            self._progress.advance(self._task)

    def _print(self, text: str) -> None:
        self._progress.console.print(escape(text), soft_wrap=True, highlight=False)


class QuietEvents(Events):
    """Nothing is shown; Ctrl-C still ends the work."""

    def solving(self, step: Step) -> None:
        interrupts.check()

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        interrupts.check()


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Progress of work without a job; yields a function of (done, total)."""
    with TerminalEvents(console) as events:
        yield lambda done, total: events.progress(what, done, total)
