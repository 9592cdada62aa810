"""A healing under way: what its ways have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.planning.events import Events
from svdconvert.settings.healing import HealRequest
from svdconvert.storage.source import LocalSource, Source

# In the folder of a healing: hidden states, how far the training is, and the blocks that are done.
STATES, STATE, BLOCKS = "states", "state.safetensors", "blocks"


@dataclass(frozen=True)
class HealingWork:
    """What is healed, on what, and where.

    Attributes:
        source: the factored checkpoint.
        dense: the model that it was made from.
        tokens: the text.
        request: how.
        folder: of the files.
        device: that computes.
        precision: of the matrix products.
        events: receiver of progress.
    """

    source: LocalSource
    dense: Source
    tokens: CalibrationTokens
    request: HealRequest
    folder: Path
    device: str
    precision: torch.dtype
    events: Events

    @property
    def key(self) -> dict[str, Any]:
        """What the files depend on, in JSON types."""
        return {"dense": self.dense.identity(), "tokens": self.tokens.digest}

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return self.request.healing.batch(self.tokens.ids.shape[1])
