"""How far a healing is, in one file that is replaced as a whole: a killed one goes on from there to the same end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.healing.optimiser import NAME
from svdconvert.storage.disk import disk_errors
from svdconvert.storage.tensor_files import read_note, read_tensors, write_tensors

# Seconds between two times that the state is written, and how many times as long as writing it they are at least.
SAVE_SECONDS, SAVE_FACTOR = 30.0, 20.0


@dataclass
class State:
    """How far a healing is.

    Attributes:
        course: number of the course at work; trials come first.
        finished: whether there is none any more.
        done: steps of it that are done.
        stale: checks of it without a gain, up to now.
        course_kl: the lowest held-out KL of the course; None before its first check.
        start_kl: held-out KL of the start; None before it is measured. Of these figures all are in nats per token, and
            in the precision of the training.
        best_kl: the lowest of the start and of the course that counts.
        best_step: of that course, where that was; 0 is the start.
        trials: learning rate and held-out KL of each trial; the latter is None where the model fell apart.
        checks: of the last course, ``step``, ``train_kl``, the mean since the last check, and ``kl``.
        train_kl: sum over the steps since the last check.
        train_steps: their number.
    """

    course: int = 0
    finished: bool = False
    done: int = 0
    stale: int = 0
    course_kl: float | None = None
    start_kl: float | None = None
    best_kl: float | None = None
    best_step: int = 0
    trials: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, float | None]] = field(default_factory=list)
    train_kl: float = 0.0
    train_steps: int = 0

    def begin(self, course: int) -> None:
        """Go on with another course."""
        self.course, self.done, self.stale, self.course_kl = course, 0, 0, None
        self.checks, self.train_kl, self.train_steps = [], 0.0, 0


class StateFile:
    """The state with its tensors on the disk: those of the optimiser, and the best factors."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Prepare.

        Args:
            path: the file.
            key: what the state depends on, in JSON types; a file of another key is passed over.
        """
        self._path, self._key = path, json.loads(json.dumps({**key, "optimiser": NAME}))
        self._saved, self._took = time.monotonic(), 0.0

    def load(self) -> tuple[State, dict[str, Tensor]] | None:
        """What was saved last; None if nothing was.

        Raises:
            InputError: the file is damaged.
        """
        if not self._path.is_file():
            return None
        told = json.loads(read_note(self._path))
        if told["key"] != self._key:
            return None
        return State(**told["state"]), read_tensors(self._path)

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved >= max(SAVE_SECONDS, SAVE_FACTOR * self._took)

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Write it, whole or not at all.

        Raises:
            JobError: the disk fails.
        """
        begun = time.monotonic()
        with disk_errors(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path, tensors, json.dumps({"key": self._key, "state": asdict(state)}))
        self._saved = time.monotonic()
        self._took = self._saved - begun
