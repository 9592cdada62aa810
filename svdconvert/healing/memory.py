"""Whether there is room to train, before anything is run."""

from __future__ import annotations

import torch

from svdconvert.errors import InputError
from svdconvert.healing.student import factor_names
from svdconvert.machine.memory import available_memory_bytes
from svdconvert.sentences import asked
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import parameters
from svdconvert.words import size

# Bytes of each parameter in float32; and of each one of a factor its gradient or a copy, and two moments.
_WEIGHT, _TRAINED = 4, 12
# Copies of the factors in the type that they are stored in: the start, the best so far, and those that are judged.
_COPIES = 3


def training_bytes(source: LocalSource) -> int:
    """Memory of a model whose factors are trained, without activations."""
    factors = [source.tensors[name] for name in factor_names(source)]
    stored = sum(info.nbytes for info in factors)
    return _WEIGHT * parameters(source.tensors.values()) + _TRAINED * parameters(factors) + _COPIES * stored


def check_memory(source: LocalSource, device: str) -> None:
    """Refuse a model that there is no room to train.

    Args:
        source: the factored checkpoint.
        device: that computes.

    Raises:
        InputError: there is less memory than its weights, gradients and moments take.
    """
    needed = training_bytes(source)
    on_gpu = device.startswith("cuda")
    free = int(torch.cuda.mem_get_info(device)[0]) if on_gpu else available_memory_bytes()
    if needed > free:
        raise InputError(
            f"healing {source.where} takes at least {size(needed)} of memory, for its weights in float32 and the "
            f"gradients and moments of its factors, but {device if on_gpu else 'this machine'} has {size(free)} free; "
            f"free some, or use another machine or {asked('device')}"
        )
