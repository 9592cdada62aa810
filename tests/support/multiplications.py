"""Multiplications that a model's linear layers really do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def of_a_token(model: Any) -> int:
    """Multiplications in linear layers, the head among them, for one token more; attention's own are left out."""
    counts = []
    for tokens in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.arange(tokens)[None])
        flops = {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}
        counts.append(sum(count for kind, count in flops.items() if kind.endswith("mm") and not kind.endswith("bmm")))
    return (counts[1] - counts[0]) // 2
