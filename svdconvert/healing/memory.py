"""Whether there is room to train, before anything is run."""

from __future__ import annotations

import torch

from svdconvert.errors import InputError
from svdconvert.machine import processes
from svdconvert.machine.memory import available_memory_bytes
from svdconvert.sentences import asked
from svdconvert.words import size


def check_memory(needed: int, what: str, device: str) -> None:
    """Refuse a model that there is no room to train; the leader of several processes looks for all.

    Args:
        needed: bytes of it in one process, as :func:`svdconvert.planning.healing_needs.training_bytes` counts them.
        what: the model, for messages.
        device: that computes.

    Raises:
        InputError: there is less memory than its weights, gradients and moments take.
    """
    on_gpu, group = device.startswith("cuda"), processes.current()
    if not group.leader:
        group.wait()
        return
    several = not on_gpu and group.local_size > 1
    needed *= group.local_size if several else 1
    free = int(torch.cuda.mem_get_info(device)[0]) if on_gpu else available_memory_bytes()
    if needed > free:
        raise InputError(
            f"healing {what} takes at least {size(needed)} of memory"
            f"{f' in {group.local_size} processes' if several else ''}, for its weights in float32 and the gradients "
            f"and moments of its factors, but {device if on_gpu else 'this machine'} has {size(free)} free; free some, "
            f"or use another machine or {asked('device')}"
        )
    group.wait()
