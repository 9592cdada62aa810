"""What to do with a plan or a result, in one sentence each: what is known to go wrong, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.methods.table import Method

# Measured by tests/benchmarks/real.py, docs/real.md: dense 23.42; 95, 90 and 80 % kept 353,345, 4,860,799 and
# 108,540,214. Relative errors do not tell: 0.26 on average there at 95 %, and 0.23 in the bundled model at 80 %, which
# loses 0.03 nats.
WITHOUT_A_TEXT = (
    "without a text, truncation has destroyed the language of a real model at every size (SmolLM2-135M, 95% of the "
    "factored layers kept: perplexity 23 -> 353,345); give one with --calib TEXT, or fine-tune the result"
)


def next_steps(method: Method, settings: Mapping[str, Any], folder: Path) -> str:
    """What to do with a result.

    Args:
        method: that it was converted by.
        settings: of its record.
        folder: where it is.
    """
    measure = f"svdconvert evaluate {shlex.quote(str(folder))} --text FILE --against MODEL"
    if not method.statistics:
        return f"{WITHOUT_A_TEXT}; measure it: {measure}"
    if settings.get("refit") == "none" and settings.get("share_layers") == 1:
        return f"measure it: {measure}; --refit sequential may win some of the loss back, fine-tuning more"
    return f"measure it: {measure}; fine-tuning wins some of the loss back"
