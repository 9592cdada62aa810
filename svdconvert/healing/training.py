"""Training of factors and scales, judged by the held-out divergence; it can be killed and goes on.

Several processes have the same factors and the same state, since all they decide on are sums over all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from svdconvert.healing.objective import Diverged
from svdconvert.healing.optimiser import Optimiser
from svdconvert.healing.schedule import PATIENCE, TRIALS, Course, best_rate, next_rate, trial_steps
from svdconvert.healing.sequences import Order
from svdconvert.healing.state import State, StateFile
from svdconvert.healing.trained import Trained
from svdconvert.machine import interrupts, processes
from svdconvert.models.head_divergence import HeadDivergence
from svdconvert.planning.events import Events

# The longest gradient, over all factors, that is followed; longer ones are shortened to it.
CLIP = 1.0


class Sequences(Protocol):
    """What is known of some sequences.

    Attributes:
        sequences: their numbers in the text, int64.
    """

    sequences: Tensor


_S = TypeVar("_S", bound=Sequences)
_Known = TypeVar("_Known", bound=Sequences, contravariant=True)


class Minimised(Protocol[_Known]):
    """What is minimised, a mean over tokens; see :class:`svdconvert.healing.objective.Objective`."""

    @property
    def name(self) -> str: ...

    @property
    def student(self) -> Trained: ...

    @property
    def precision(self) -> torch.dtype: ...

    def measure(self, known: _Known, sequences: Tensor, precision: torch.dtype | None = None, /) -> HeadDivergence: ...

    def differentiate(self, known: _Known, sequences: Tensor, /) -> float: ...


@dataclass(frozen=True)
class Texts(Generic[_S]):
    """What is known of the text.

    Attributes:
        train: of the sequences that are trained on.
        held_out: of those that judge.
        order: of the first ones.
    """

    train: _S
    held_out: _S
    order: Order


class Training(Generic[_S]):
    """Courses of training from one start: trials of learning rates, and the one that counts.

    Attributes:
        state: how far it is.
        best: the best factors so far, as a checkpoint has them, on the host; None while that is the start.
    """

    def __init__(
        self,
        objective: Minimised[_S],
        texts: Texts[_S],
        rate: float | None,
        steps: int,
        anchor: float,
        file: StateFile,
        events: Events,
    ) -> None:
        """Take up what was saved, or begin.

        Args:
            objective: what is minimised.
            texts: on what.
            rate: learning rate; None to choose one.
            steps: of the optimiser, after that choice.
            anchor: see :class:`svdconvert.settings.healing.Healing`.
            file: keeps the state.
            events: receiver of progress.
        """
        self._objective, self._texts, self._file, self._events = objective, texts, file, events
        self._rate, self._steps, self._anchor = rate, steps, anchor
        self._optimiser = Optimiser(self._student.factors, self._student.scales, objective.precision)
        self.state = State()
        self.best: dict[str, Tensor] | None = None
        found = file.load()
        if found is not None:
            self.state, tensors = found
            prefix = "best/"
            best = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            self.best = best or None
            if self.state.done:
                self._optimiser.restore(tensors, self.state.done)

    @property
    def _student(self) -> Trained:
        return self._objective.student

    @property
    def rate(self) -> float | None:
        """The learning rate of the course that counts; None if the model falls apart at all of them."""
        if self._rate is not None:
            return self._rate
        assert self.state.start_kl is not None
        return best_rate(self._tried, self.state.start_kl)

    @property
    def _tried(self) -> dict[float, float]:
        """Learning rate -> divergence that its trial came to."""
        return {trial["lr"]: math.inf if trial["kl"] is None else trial["kl"] for trial in self.state.trials}

    def run(self) -> None:
        """Do what is left.

        Raises:
            JobError: the disk fails.
            KeyboardInterrupt: the user asked for it; the state is saved.
        """
        processes.current().wait()  # until all have read the state, which the leader writes anew
        with interrupts.held():
            if self.state.start_kl is None:
                self.state.start_kl = self.state.best_kl = self._judge(self._student.start)
            while (course := self._course()) is not None:
                self._take(course)
                self._save()

    def _course(self) -> Course | None:
        """The course at work; None when all are done."""
        if self.state.finished:
            return None
        assert self.state.start_kl is not None
        trial = next_rate(self._tried, self.state.start_kl) if self._rate is None else None
        if trial is not None:
            return Course(trial, trial_steps(self._steps), trial=True)
        return None if self.rate is None else Course(self.rate, self._steps, trial=False)

    def _take(self, course: Course) -> None:
        """Take a course, or what is left of it."""
        state = self.state
        if not state.done:
            self._student.put(self._student.start)
            self._optimiser.begin()
        self._optimiser.forget_gradients()  # of a course that fell apart
        try:
            while state.done < course.steps and state.stale < PATIENCE:
                self._step(course)
                if course.is_check(state.done):
                    self._check(course)
                self._pause(course)
        except Diverged:
            state.checks.append({"step": state.done, "train_kl": None, "kl": None})
        if course.trial:
            state.trials.append({"lr": course.rate, "kl": state.course_kl})
            state.begin(state.course + 1)
        else:  # what its checks were is to be told
            state.finished, state.done = True, 0

    def _step(self, course: Course) -> None:
        """One step of the optimiser.

        Raises:
            Diverged: the predictions or the gradient are not finite.
        """
        state = self.state
        state.train_kl += self._objective.differentiate(self._texts.train, self._texts.order(state.done))
        self._student.gradients()  # so that all have one
        norm = torch.nn.utils.clip_grad_norm_(self._student.factors.values(), CLIP)
        if not bool(torch.isfinite(norm)):
            raise Diverged
        rate = course.rate_at(state.done)
        self._optimiser.step(rate)  # which frees the gradients: a check takes as much memory
        if self._anchor:
            self._student.pull(min(1.0, rate * self._anchor))
        state.done, state.train_steps = state.done + 1, state.train_steps + 1

    def _check(self, course: Course) -> None:
        """Judge the factors as they would be stored, and keep them if they are the best."""
        state, stored = self.state, self._student.stored()
        kl = self._judge(stored)
        state.checks.append({"step": state.done, "train_kl": state.train_kl / state.train_steps, "kl": kl})
        state.train_kl, state.train_steps = 0.0, 0
        better = state.course_kl is None or kl < state.course_kl
        state.course_kl, state.stale = (kl, 0) if better else (state.course_kl, state.stale + 1)
        assert state.best_kl is not None
        if kl < state.best_kl and not course.trial:
            state.best_kl, state.best_step = kl, state.done
            self.best = {name: tensor.cpu() for name, tensor in stored.items()}

    def _judge(self, factors: dict[str, Tensor]) -> float:
        """Held-out KL of some factors, nats per token.

        Raises:
            Diverged: the predictions are not finite.
        """
        with self._student.having(factors):
            sums = self._objective.measure(self._texts.held_out, self._texts.held_out.sequences)
        if not math.isfinite(sums.kl):
            raise Diverged
        return sums.kl / sums.tokens

    def _pause(self, course: Course) -> None:
        """Save where it is time to, stop where the user wants it, and tell how far it is."""
        if interrupts.asked() or (processes.current().leader and self._file.due):
            self._save()
        state = self.state
        short = trial_steps(self._steps)
        before, total = state.course * short, self._steps + (TRIALS * short if self._rate is None else 0)
        best = f"held-out {self._objective.name} {state.best_kl:.4f}"
        what = f"trial of learning rate {course.rate:g}" if course.trial else best
        self._events.progress("healing", before + state.done, total, what)
        interrupts.check()

    def _save(self) -> None:
        if not processes.current().leader:
            return  # all have the same state
        best = {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        self._file.save(self.state, {**(self._optimiser.tensors() if self.state.done else {}), **best})
