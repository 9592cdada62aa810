"""A factored checkpoint and the same densified, and the models that they are, each loaded once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from support.running import load


@dataclass(frozen=True)
class Pair:
    """Read only, the models too: what changes one loads it for itself.

    Attributes:
        factored: folder of the factored checkpoint.
        densified: folder of the dense one that :func:`svdconvert.densify` makes of it.
    """

    factored: Path
    densified: Path

    @cached_property
    def model(self) -> Any:
        """The factored causal model."""
        return load(self.factored)

    @cached_property
    def stock(self) -> Any:
        """The stock class's model of the densified weights."""
        return AutoModelForCausalLM.from_pretrained(self.densified).eval()
