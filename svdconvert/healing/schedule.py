"""Courses of training: how many steps at which learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Part of a course in which the learning rate rises.
WARM_UP = 0.05
# A trial has this part of the steps, and no fewer than so many.
TRIAL_PART, TRIAL_STEPS = 0.1, 10
# Times that a course is judged on its way, the end included; so many times without a gain end it. They are many, as
# much of the gain comes late, with the low learning rates.
CHECKS, PATIENCE = 10, 5


@dataclass(frozen=True)
class Course:
    """Steps from the start on.

    Attributes:
        rate: highest learning rate.
        steps: of the optimiser.
        trial: whether it only serves to choose a learning rate.
    """

    rate: float
    steps: int
    trial: bool

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear rise, then a cosine down to nothing."""
        rise = max(1, round(WARM_UP * self.steps))
        if step < rise:
            return self.rate * (step + 1) / rise
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (self.steps - rise)))

    def is_check(self, done: int) -> bool:
        """Whether the model is judged after so many steps; a trial at its end alone."""
        every = self.steps if self.trial else math.ceil(self.steps / CHECKS)
        return done == self.steps or done % every == 0


def trials(rates: tuple[float, ...], steps: int) -> list[Course]:
    """The courses that a learning rate is chosen by; none where there is no choice.

    Args:
        rates: to choose from.
        steps: of the course that is then taken.
    """
    short = min(steps, max(TRIAL_STEPS, round(TRIAL_PART * steps)))
    return [Course(rate, short, True) for rate in rates] if len(rates) > 1 else []
