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
# A trial flatters low rates: what a high one loses at first it makes good in a course ten times as long. So of those
# whose gain is at least this part of the best one's, the highest is taken (docs/heal.md has what both came to).
NEARLY = 0.9
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


def next_rate(tried: Mapping[float, float], start: float) -> float | None:
    """The learning rate to be tried next: one of the two in the middle of :data:`RATES`, the other one, and then that
    beside the better of both; None after these.

    Args:
        tried, start: see :func:`best_rate`.
    """
    lowest, low, high, highest = RATES
    for rate in (low, high):
        if rate not in tried:
            return rate
    beside = highest if best_rate({low: tried[low], high: tried[high]}, start) == high else lowest
    return None if beside in tried else beside


def best_rate(tried: Mapping[float, float], start: float) -> float | None:
    """The highest learning rate whose trial gained nearly as much as any; without gains the one of the least loss, and
    None where the model fell apart at all of them.

    Args:
        tried: learning rate -> the divergence that its trial came to, infinite where the model fell apart.
        start: the divergence before.
    """
    least = min(tried.values())
    if math.isinf(least):
        return None
    if least >= start:
        return min(rate for rate, kl in tried.items() if kl == least)
    return max(rate for rate, kl in tried.items() if start - kl >= NEARLY * (start - least))
