"""How a matrix is gone through: panel by panel, in buffers that are used again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Rows (or columns) of W that are brought to the working type at a time: large enough for a full-speed product, small
# enough that the copy stays far below the matrix's own size.
PANEL = 1024


@dataclass
class Workspace:
    """Buffers that are used again for every matrix.

    Fresh memory costs a page fault every 4 KiB, on virtual machines more than the arithmetic of a small matrix.
    """

    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; what an earlier call of the same name returned is overwritten."""
        need = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < need or buffer.device != device:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(need, dtype=torch.uint8, device=device)
        return buffer[:need].view(dtype).view(shape)

    def clear(self) -> None:
        """Give the buffers up; what they held may still be in use."""
        self._buffers.clear()


@dataclass(frozen=True)
class Scaled:
    """A matrix times a power of four, brought to a working type piece by piece.

    Attributes:
        weight: [m, n], any floating type.
        scale: the power of four.
        work: its buffers hold one piece at a time.
        by_rows: whether the pieces are rows; None: along the longer side.
    """

    weight: Tensor
    scale: float
    work: Workspace
    by_rows: bool | None = None

    @property
    def tall(self) -> bool:
        """Whether the pieces are rows: the factor on the input side is then the smaller one."""
        return self.weight.shape[0] >= self.weight.shape[1] if self.by_rows is None else self.by_rows

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Pieces along the longer side: [p, n] if tall, [m, p] if wide. Each is valid until the next."""
        length = self.weight.shape[0 if self.tall else 1]
        for start in range(0, length, PANEL):
            part = slice(start, min(start + PANEL, length))
            piece = self.weight[part] if self.tall else self.weight[:, part]
            if piece.dtype != dtype or self.scale != 1:
                buffer = self.work.take("panel", tuple(piece.shape), dtype, piece.device)
                piece = buffer.copy_(piece)
                if self.scale != 1:
                    piece.mul_(self.scale)
            yield part, piece
