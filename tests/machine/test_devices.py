"""The device that computes."""

from __future__ import annotations

import pytest
import torch

from svdconvert.machine.devices import resolve_device


def test_float32_is_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 that the environment of a container turned on is off, on a GPU that is named or found."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda", "cuda:0"):
        torch.set_float32_matmul_precision("high")
        assert torch.backends.cuda.matmul.allow_tf32
        try:
            assert resolve_device(name).startswith("cuda")
            assert not torch.backends.cuda.matmul.allow_tf32
        finally:
            torch.set_float32_matmul_precision("highest")
