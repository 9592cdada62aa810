"""What families do with the output of their heads before it is called logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _as_they_are(config: Any, logits: Tensor) -> Tensor:
    return logits


def _soft_capped(config: Any, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _divided(config: Any, logits: Tensor) -> Tensor:
    return logits / config.logits_scaling


# Name in a family's row -> (config, output of the head) -> logits, element by element.
LOGITS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "as they are": _as_they_are,
    "soft-capped": _soft_capped,
    "divided by logits_scaling": _divided,
    "times logits_scaling": lambda config, logits: logits * config.logits_scaling,
    "times logit_scale": lambda config, logits: logits * config.logit_scale,
    "times lm_head_multiplier": lambda config, logits: logits * config.lm_head_multiplier,
}


class Logits(nn.Module):
    """The step after the head of a model: [..., n] -> [..., n]."""

    def __init__(self, name: str, config: Any) -> None:
        """Prepare.

        Args:
            name: row of :data:`LOGITS`.
            config: the model's, an object of transformers.
        """
        super().__init__()
        self._function, self._config = LOGITS[name], config

    def forward(self, logits: Tensor) -> Tensor:
        return self._function(self._config, logits)
