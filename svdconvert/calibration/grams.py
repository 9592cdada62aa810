"""Sums of x x^T over many rows, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.machine.processes import Group

# The upper triangle is summed in panels of this many columns, from this many rows at a time.
PANEL, ROWS = 256, 1024


class GramSum:
    """Sum of x x^T over rows, products and sum in float64.

    Products in float32 are not exact enough, even if they are summed in float64. If a few tokens have several massive
    channels (1e3 to 1e4 times the others, as the first token of a sequence in many models), rounding drowns the small
    eigenvalues that whitening depends on: at 1e4 the smallest come out wrong or negative, and a truncation in that
    metric may lose several times more than it must. As only the upper triangle is computed, float64 takes no longer on
    a CPU than a plain product in float32.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Start at zero.

        Args:
            size: length of x.
            device: of the rows and of the sum.
        """
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows [n, size]."""
        for part in rows.split(ROWS):
            exact = part.double()
            for begin in range(0, exact.shape[1], PANEL):
                end = begin + PANEL
                self._sum[begin:end, begin:].addmm_(exact[:, begin:end].T, exact[:, begin:])

    def mean(self, count: int, group: Group | None = None) -> Tensor:
        """The symmetric mean over ``count`` rows; ends the sum.

        It stays on its device, where it is used next; the mean of several processes is on the CPU.
        """
        mean = self._sum if group is None or group.size == 1 else group.add(self._sum.cpu())
        del self._sum
        for begin in range(0, mean.shape[0], PANEL):
            end = begin + PANEL
            corner = mean[begin:end, begin:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            mean[end:, begin:end] = mean[begin:end, end:].T
        return mean.div_(count)
