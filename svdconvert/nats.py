"""Losses in nats."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp of a loss; infinite where no float is so large.

    >>> perplexity(0.0), perplexity(1000.0)
    (1.0, inf)

    Args:
        loss: nats per token.
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
