"""Courses of training: how many steps at which learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.settings.healing import RATES

# Part of a course in which the learning rate rises.
WARM_UP = 0.05
# A trial has this part of the steps, and no fewer than so many. There are so many trials.
TRIAL_PART, TRIAL_STEPS, TRIALS = 0.1, 10, 3
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


def trial_steps(steps: int) -> int:
    """Steps of a trial, for a course of so many."""
    return min(steps, max(TRIAL_STEPS, round(TRIAL_PART * steps)))


def next_rate(tried: Mapping[float, float]) -> float | None:
    """The learning rate to be tried next: one of the two in the middle of :data:`RATES`, the other one, and then that
    beside the better of both; None after these.

    Args:
        tried: learning rate -> the divergence that its trial came to, infinite where the model fell apart.
    """
    lowest, low, high, highest = RATES
    for rate in (low, high, highest if tried.get(high, math.inf) < tried.get(low, math.inf) else lowest):
        if rate not in tried:
            return rate
    return None
