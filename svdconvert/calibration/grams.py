"""Sums of x x^T over many rows, as exact as whitening needs them, with few products in float64.

Products in float32 are not exact enough by themselves. If a few tokens have several massive channels (1e3 to 1e4 times
the others, as the first token of a sequence in many models), rounding of their products drowns the small eigenvalues
that whitening depends on: at 1e4 the smallest come out wrong or negative, and a truncation in that metric may lose
several times more than it must. An offset that all tokens have does the same. But both can be split off. A centre m,
near the middle of every channel, is taken from all tokens, x = m + z, and the products of those that have an entry far
beyond its channel's usual size are float64. The others' are float32, in sums of :data:`ROWS` tokens, which are added up
in float64, and sum x x^T = sum z z^T + s m^T + m s^T + n m m^T, with s = sum z. What rounding then leaves is some 1e-7
to 1e-6 of the channels' deviations.

That is enough for a metric that is shrunk towards its diagonal (:func:`svdconvert.methods.table.shrink`). One that is
not may be singular, and would be no more: channels that a norm makes add up to zero, for one. So it is left to float64.

Only the upper triangle is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.products import add_product
from svdconvert.machine.processes import Group
from svdconvert.machine.products import multiply

# The upper triangle is summed in panels of this many columns, from this many rows at a time.
PANEL, ROWS = 256, 1024

# Rows of float32 products come in multiples of so many.
STEP = 32

# A channel's usual size is that of its quieter groups of this many rows.
GROUP = 4

# Rows that the centre is taken from.
SAMPLE = 64

# An entry beyond so many times the usual size of its channel makes its row one for float64.
LOUD = 512.0

# Channels whose usual size is below this share of the channels' mean count as that large.
LEAST_SHARE = 1 / 8

# Squares of larger entries are not left to float32.
LARGEST = 2.0**50


class GramSum:
    """Sum of x x^T over rows, in float64."""

    def __init__(self, size: int, device: torch.device, *, exact: bool = False) -> None:
        """Start at zero.

        Args:
            size: length of x.
            device: of the rows and of the sum.
            exact: whether all products are to be float64.
        """
        self._exact = exact
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        # Few rows at a time would cost as much as many.
        self._waiting: list[Tensor] = []
        self._centre: Tensor | None = None
        self._off_centre = torch.zeros(size, dtype=torch.float64, device=device)
        self._centred = 0

    def add(self, rows: Tensor) -> None:
        """Add rows [n, size], of any floating type."""
        for part in rows.split(ROWS):
            if self._exact or part.dtype == torch.float64 or len(part) < GROUP:
                self._add_exactly(part)
                continue
            single = part.float()
            if self._centre is None:  # once for all; it need not be exact
                self._centre = single[_spread(len(single))].median(dim=0).values
            single = single - self._centre
            loud, kept = loud_rows(single), len(single)
            if bool(loud.any()):
                self._waiting.append(part[loud])
                single[loud] = 0
                kept -= len(self._waiting[-1])
                if sum(map(len, self._waiting)) >= ROWS:
                    self._add_waiting()
            self._off_centre += single.sum(dim=0)
            self._centred += kept
            self._add_panels(_columns(single))

    def _add_waiting(self) -> None:
        if self._waiting:
            self._add_exactly(torch.cat(self._waiting))
            self._waiting = []

    def _add_exactly(self, rows: Tensor) -> None:
        exact = rows.double()
        for begin in range(0, exact.shape[1], PANEL):
            end = begin + PANEL
            add_product(self._sum[begin:end, begin:], exact[:, begin:end].T, exact[:, begin:])

    def _add_panels(self, columns: Tensor) -> None:
        """Add the rows whose transpose is given, [size, n] float32, contiguous."""
        for begin in range(0, len(columns), PANEL):
            end = begin + PANEL
            self._sum[begin:end, begin:] += multiply(columns[begin:end], columns[begin:].T)

    def mean(self, count: int, group: Group | None = None) -> Tensor:
        """The symmetric mean over ``count`` rows; ends the sum.

        It stays on its device, where it is used next; the mean of several processes is on the CPU.
        """
        self._add_waiting()
        if self._centre is not None:
            centre = self._centre.double()
            other = self._off_centre + self._centred / 2 * centre
            self._sum.addr_(other, centre).addr_(centre, other)
        mean = self._sum if group is None or group.size == 1 else group.add(self._sum.cpu())
        del self._sum
        for begin in range(0, mean.shape[0], PANEL):
            end = begin + PANEL
            corner = mean[begin:end, begin:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            mean[end:, begin:end] = mean[begin:end, end:].T
        return mean.div_(count)


def _columns(rows: Tensor) -> Tensor:
    """The transpose, contiguous, with zeros for further rows up to a multiple of :data:`STEP`.

    oneDNN compiles kernels for every size of a product, and keeps them.
    """
    count = len(rows)
    columns = rows.new_empty(rows.shape[1], -(-count // STEP) * STEP)
    columns[:, :count] = rows.T
    columns[:, count:] = 0
    return columns


def _spread(count: int) -> Tensor:
    """:data:`SAMPLE` of so many rows, evenly spread but at no regular distance, which massive rows may have."""
    golden = (5**0.5 - 1) / 2
    return (torch.arange(SAMPLE, dtype=torch.float64) * golden % 1 * count).long()


def loud_rows(rows: Tensor) -> Tensor:
    """Which rows have an entry far beyond the usual size of its channel.

    That size is the harmonic mean over groups of rows of the channel's root mean square within the group, which a
    massive row raises in its own group alone. Groups in which a channel is silent do not count.

    Args:
        rows: [n, size] float32, n at least :data:`GROUP`.

    Returns:
        [n], bool.
    """
    squares = rows.square()
    whole = len(rows) // GROUP * GROUP
    sizes = squares[:whole].view(-1, GROUP, rows.shape[1]).sum(1).div_(GROUP).sqrt_()
    heard = sizes > 0
    usual = heard.sum(0) / torch.where(heard, sizes.reciprocal(), 0).sum(0).clamp_min(torch.finfo(sizes.dtype).tiny)
    usual = usual.clamp_min(float(usual.square().mean().sqrt()) * LEAST_SHARE)
    most = (LOUD * usual).clamp_max(LARGEST).square()
    # amax is ten times as fast as any
    return squares.sub_(most).amax(dim=1) > 0
