"""The device that computes."""

from __future__ import annotations

import re

from svdconvert.errors import InputError
from svdconvert.machine import processes
from svdconvert.sentences import asked


def resolve_device(device: str) -> str:
    """The device that ``auto`` or ``cuda`` stands for on this machine; other names as they are.

    On a GPU, products of float32 matrices are float32 from now on, whatever the environment says: NVIDIA's containers
    turn TF32 on by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, whose ten bits are too few for statistics and factors.

    Raises:
        InputError: the name is unknown or the device is not there.
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise InputError(f"{asked('device', device)} is unknown; choose auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device != "cpu":
        torch.set_float32_matmul_precision("highest")
    group = processes.current()
    if device == "cuda" and count and group.size > 1:  # one GPU for each process of a machine, while there are enough
        return f"cuda:{group.local_rank % count}"
    if device == "cpu":
        return device
    if int(device.partition(":")[2] or 0) >= count:
        raise InputError(
            f"{asked('device', device)} is not there: torch sees {count} CUDA devices; use {asked('device', 'cpu')}"
        )
    return device


def has_bfloat16(device: str) -> bool:
    """Whether a device multiplies matrices of bfloat16 by itself, which is then faster than float32.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if device != "cpu":
        import torch

        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            for line in handle:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):  # x86, ARM
                    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(value.split())
    except OSError:
        pass
    return False
