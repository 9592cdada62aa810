"""In what type matrix products are computed, while all that is added up stays float32."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from svdconvert.errors import InputError
from svdconvert.machine.devices import has_bfloat16
from svdconvert.sentences import asked


def precision_of(name: str, device: str) -> torch.dtype:
    """The type that a request names.

    Args:
        name: of :data:`svdconvert.settings.healing.PRECISIONS`.
        device: that computes.

    Raises:
        InputError: the device does not compute in it.
    """
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if name == "bfloat16" and device != "cpu" and not has_bfloat16(device):
        raise InputError(f"{device} does not compute in bfloat16; use {asked('precision', 'float32')}")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def computing(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    """Context in which linear layers and attention compute in a type, whatever that of their weights is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != torch.float32)
