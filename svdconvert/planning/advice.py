"""Advice on a plan or a result, one sentence each: known pitfalls, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.methods.table import Method
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.size import INFERENCE

# Measured, docs/real.md: dense 23.42; 95, 90 and 80 % kept 353,345, 4,860,799 and
# 108,540,214. Relative errors do not tell: 0.26 on average there at 95 %, and 0.23 in the bundled model at 80 %, which
# loses 0.03 nats.
WITHOUT_A_TEXT = Sentence(
    "without a text, truncation has destroyed the language of a real model at every size (SmolLM2-135M, 95% of the "
    f"factored layers kept: perplexity 23 -> 353,345); convert with {asked('calibration')}, or fine-tune the result"
)


def unmeasured(method: Method, settings: Mapping[str, Any]) -> bool:
    """Whether a model is truncated without a text that says what this costs: :data:`WITHOUT_A_TEXT` then applies.

    Args:
        method: that converts.
        settings: of the plan or the record.
    """
    return not method.statistics and settings.get("max_loss") is None and settings.get("max_kl") is None


def next_steps(method: Method, settings: Mapping[str, Any], folder: Path) -> Sentence:
    """Advice on a result.

    Args:
        method: the method it was converted with.
        settings: those in its record.
        folder: the result's folder.
    """
    measure = f"svdconvert evaluate {shlex.quote(str(folder))} --text FILE --against MODEL"
    if unmeasured(method, settings):
        return Sentence(f"{WITHOUT_A_TEXT.marked}; measure it: {measure}")
    if any(settings.get(name) is not None for name in ("bytes", "widths")) or settings.get("fit_for") == INFERENCE:
        heal = "" if "heal" in settings else "`svdconvert heal`, which trains its scales, or "
        return Sentence(
            f"measure it: {measure}; to load it, install compressed-tensors (`pip install 'svdconvert[packed]'`); "
            f"{heal}an adapter trained beside it wins back some of the loss"
        )
    heal = "fine-tuning" if "heal" in settings else "`svdconvert heal` or fine-tuning"
    # A refit lowers the loss, and may move the predictions further away.
    refitted = method.statistics and settings.get("max_kl") is None
    shared = settings.get("share_layers") != 1 or settings.get("share_experts")
    if refitted and "heal" not in settings and settings.get("refit") == "none" and not shared:
        refit = asked("refit", "sequential")
        return Sentence(f"measure it: {measure}; {refit} may win back some of the loss, and {heal} more")
    return Sentence(f"measure it: {measure}; {heal} wins back some of the loss")
