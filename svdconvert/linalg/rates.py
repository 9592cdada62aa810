"""How much slower than float32 a device multiplies in float64.

Processors take twice as long, and so do the GPUs of data centres. On others it is 32 to 64 times; nothing lies between,
so that what is decided by it is the same in every run.
"""

from __future__ import annotations

import time

import torch

# From here on float64 counts as slow.
SLOW = 8.0

# Side of the products that are timed.
_SIDE, _ROUNDS = 2048, 3

# Device -> times; measured once in a process.
_known: dict[str, float] = {}


def times_as_slow(device: torch.device) -> float:
    """How many times as long a product takes in float64 as in float32; measured on GPUs, 1 for others."""
    if str(device) not in _known:
        _known[str(device)] = _measured(device) if device.type == "cuda" else 1.0
    return _known[str(device)]


def has_slow_float64(device: torch.device) -> bool:
    """Whether float64 is to be spared on a device."""
    return times_as_slow(device) >= SLOW


def _measured(device: torch.device) -> float:
    seconds = []
    for dtype in (torch.float32, torch.float64):
        matrix = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
        found = []
        for _ in range(_ROUNDS):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            matrix @ matrix
            torch.cuda.synchronize(device)
            found.append(time.perf_counter() - start)
        seconds.append(min(found))
    return seconds[1] / seconds[0]
