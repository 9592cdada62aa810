"""How tensors get to the device that computes, and back.

On a GPU three things run at the same time, each on its own streams: copies from pinned memory to the device, the work
of each worker, and copies back into pinned memory. None of them blocks the host: a stream waits for another one by an
event, and the host waits for an event only when it needs the numbers. On any other device a tensor is copied, or is
already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Transfer:
    """Tensors in transfer.

    On a GPU a tensor belongs to the stream that created it: another stream that uses it must be recorded, or its memory
    may be reused too early.
    """

    def __init__(self, tensors: Sequence[Tensor], arrived: torch.cuda.Event | None = None) -> None:
        self._tensors, self._arrived = list(tensors), arrived

    def take(self) -> list[Tensor]:
        """The tensors, for work on the calling thread's stream."""
        if self._arrived is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._arrived)
            for tensor in self._tensors:
                tensor.record_stream(stream)
        return self._tensors

    def wait(self) -> list[Tensor]:
        """The tensors, once the host may read them and may reuse the memory that they were copied from."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


class Lanes:
    """The ways to a device and back; this class is for devices on which the host's own threads compute, or wait.

    Attributes:
        ahead: units of work that a worker starts before it asks for the first one's result.
    """

    ahead = 0

    def __init__(self, device: torch.device) -> None:
        """Prepare.

        Args:
            device: what computes.
        """
        self.device = device

    def staging(self, size: int) -> Tensor:
        """Host memory for tensors to be uploaded: [size] uint8."""
        return torch.empty(size, dtype=torch.uint8)

    def upload(self, tensors: Sequence[Tensor]) -> Transfer:
        """Start to copy tensors to the device; their memory must not change until :meth:`Transfer.wait`."""
        return Transfer([tensor.to(self.device) for tensor in tensors])

    def worker(self) -> AbstractContextManager[object]:
        """Context in which one worker's thread computes; can be entered repeatedly."""
        return nullcontext()

    def download(self, tensors: Sequence[Tensor]) -> Transfer:
        """Start to copy contiguous tensors of the calling thread's stream to the host."""
        return Transfer([tensor.cpu() for tensor in tensors])


class _CudaLanes(Lanes):
    ahead = 1

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # torch loads its solver library at the first call, which must not come from several threads at once
        # (pytorch/pytorch#90613)
        torch.linalg.eigh(torch.eye(2, device=device))
        self._arriving, self._leaving = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def upload(self, tensors: Sequence[Tensor]) -> Transfer:
        with torch.cuda.stream(self._arriving):
            there = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return Transfer(there, self._arriving.record_event())

    def worker(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def download(self, tensors: Sequence[Tensor]) -> Transfer:
        done = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(self._leaving):
            self._leaving.wait_event(done)
            here = []
            for tensor in tensors:
                # torch keeps freed pinned memory, so only the first ones are expensive
                target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                here.append(target.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._leaving)
            return Transfer(here, self._leaving.record_event())


def lanes_of(device: torch.device) -> Lanes:
    """The ways to a device."""
    return _CudaLanes(device) if device.type == "cuda" else Lanes(device)
