"""What a training run holds in memory: counted before the first step, measured while it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

# AdamW keeps two moments. Names as of transformers; others are counted like plain AdamW.
_STATE_BYTES = {"paged_adamw_8bit": 2, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "adafactor": 0, "sgd": 0}


@dataclass(frozen=True)
class Memory:
    """Bytes of a run's standing parts; activations and workspaces come on top.

    Attributes:
        parameters, trainable: numbers of parameters; a 4-bit weight counts as the weights it stands for.
        weights: of all weights as they are stored, quantisation constants included.
        gradients: of the trainable ones.
        optimizer: the optimiser's state.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def standing(self) -> int:
        """Weights, gradients and optimiser together."""
        return self.weights + self.gradients + self.optimizer

    def to_json(self) -> dict[str, int]:
        """The numbers, with their sum."""
        return asdict(self) | {"standing": self.standing}


def count_memory(model: nn.Module, optimizer: str = "adamw_torch") -> Memory:
    """Count a model that is loaded, or built on the meta device, before it trains.

    Args:
        model: with ``requires_grad`` as it will train.
        optimizer: its name in transformers.
    """
    parameters = trainable = weights = gradients = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        numbers = state.shape.numel() if state is not None else parameter.numel()
        parameters += numbers
        weights += parameter.numel() * parameter.element_size()
        if state is not None:
            weights += _state_bytes(state)
        if parameter.requires_grad:
            trainable += numbers
            gradients += parameter.numel() * parameter.element_size()
    weights += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return Memory(parameters, trainable, weights, gradients, trainable * _STATE_BYTES.get(optimizer, 8))


def _state_bytes(state: Any) -> int:
    inner = getattr(state, "state2", None)  # of double quantisation, until a CPU kernel repacks it
    size: int = state.absmax.numel() * state.absmax.element_size()
    return size + (inner.absmax.numel() * inner.absmax.element_size() if inner is not None else 0)


class PeakMemory:
    """Highest memory of this process from here on: allocated on the GPU, or resident above what was there before."""

    def __init__(self, device: torch.device) -> None:
        """Start to measure.

        Args:
            device: a GPU, or the CPU, where only Linux tells.
        """
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        self._before = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is resident now
        except OSError:
            self._before = 0  # some containers forbid it; the whole process counts then

    @property
    def what(self) -> str:
        """What the number says, for tables."""
        if self._device.type == "cuda":
            return "allocated on the GPU"
        return "resident, above the process before the model" if self._before else "resident, whole process"

    def bytes(self) -> int:
        """The peak; 0 where the system does not tell."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(_status("VmHWM") - self._before, 0)


def _status(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
