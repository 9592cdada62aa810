"""From epochs to steps: 13,737 rows in batches of 64 for 3 epochs are 644 steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from examples.dialogue.settings import TrainingSettings
from svdconvert.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """A run in steps of the whole batch.

    Attributes:
        steps: optimiser steps.
        warmup: steps in which the learning rate rises.
        evaluation: steps between two evaluations.
        accumulation: micro-batches of every device that make a batch.
    """

    steps: int
    warmup: int
    evaluation: int
    accumulation: int


def schedule(rows: int, training: TrainingSettings, devices: int = 1) -> Schedule:
    """The steps of a recipe that is written in epochs.

    Epochs are counted in rows, not in batches: the run ends when ``epochs * rows`` rows were drawn, and its lengths are
    fractions of that, the number of steps rounded up, the others to the nearest.

    Args:
        rows: training samples.
        training: the recipe.
        devices: processes that share a batch.

    Raises:
        InputError: the batch cannot be split evenly.
    """
    together = training.micro_batch * devices
    if training.batch_size % together:
        raise InputError(
            f"training.batch_size {training.batch_size} is not a multiple of {devices} devices times "
            f"training.micro_batch {training.micro_batch}; change the micro-batch"
        )
    per_epoch = rows / training.batch_size
    steps = training.max_steps or math.ceil(training.epochs * per_epoch - 1e-9)
    return Schedule(
        steps=steps,
        warmup=min(round(training.warmup_epochs * per_epoch), steps),
        evaluation=min(max(round(training.evaluation_epochs * per_epoch), 1), steps),
        accumulation=training.batch_size // together,
    )
