"""The end of a model: the head, whole or in parts, and what families do with its output before it is called logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.models.head_sizes import positions_of_whole


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


@dataclass(frozen=True)
class Head:
    """What a model does with the last block's output, with the weights there of one part of its vocabulary at a time.

    Attributes:
        final: [n, hidden] -> [n, width], what goes into every part: the final norm as a rule.
        parts: the tokens of each part, in order; a head that is there whole has one.
        positions: of a text that are run at a time.
        part: the number of a part -> context in which it is there, [n, width] -> logits of its tokens: a linear layer,
            and what follows it element by element.
    """

    final: nn.Module
    parts: Sequence[slice]
    positions: int
    part: Callable[[int], AbstractContextManager[nn.Sequential]]


def whole_head(output: nn.Sequential, vocabulary: int, final: nn.Module | None = None) -> Head:
    """A head whose weights are there.

    Args:
        output: [n, width] -> logits [n, vocabulary].
        vocabulary: size of a row of logits.
        final: what comes before it; nothing by default.
    """
    positions = positions_of_whole(vocabulary)
    return Head(final or nn.Identity(), [slice(0, vocabulary)], positions, lambda number: nullcontext(output))
