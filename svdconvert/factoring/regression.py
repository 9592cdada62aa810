"""The ridge regression of a refit: which output-side factor fits what a layer should give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Weights of the pull towards the truncation's own factor; where none of them helps, that factor is kept.
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Sums:
    """Sums over tokens for one layer, with z = A x of its input and t its target.

    Attributes:
        gram: sum of z z^T, [rank, rank] float64.
        cross: sum of t z^T, [out, rank] float64.
        energy: sum of |t|^2.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    @classmethod
    def zeros(cls, rank: int, out: int, device: torch.device) -> Sums:
        """Those of no tokens."""
        gram, cross = (torch.zeros(rows, rank, dtype=torch.float64, device=device) for rows in (rank, out))
        return cls(gram, cross)

    def add(self, inner: Tensor, target: Tensor) -> None:
        """Add tokens: z, [tokens, rank], and t, [tokens, out], both float64."""
        self.gram.addmm_(inner.T, inner)
        self.cross.addmm_(target.T, inner)
        self.energy += float(target.square().sum())

    def error(self, up: Tensor) -> float:
        """Squared error of an output-side factor B, relative to the target's energy."""
        squared = self.energy - 2 * float((self.cross * up).sum()) + float(((up @ self.gram) * up).sum())
        return max(squared, 0.0) / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class Fit:
    """How a regression ended.

    Attributes:
        up: the output-side factor, [out, rank] float64.
        damping: row of :data:`DAMPINGS` that gave it; None where the truncation's own factor is the best.
        before, after: squared errors on the held-out sequences of the truncation's own factor and of this one.
    """

    up: Tensor
    damping: float | None
    before: float
    after: float

    def to_json(self) -> dict[str, Any]:
        """The report of the matrix: ``damping`` and ``held_out_error``, relative errors before and after."""
        return {"damping": self.damping, "held_out_error": [self.before**0.5, self.after**0.5]}


def fit(train: Sums, held_out: Sums, up: Tensor) -> Fit:
    """Find the factor of least error on the held-out sequences, the truncation's own among the candidates.

    Args:
        train: sums that the candidates are computed from.
        held_out: sums that choose between them.
        up: the truncation's own factor, [out, rank] float64.
    """
    before = held_out.error(up)
    best = Fit(up, None, before, before)
    pull = torch.where(train.gram.diagonal() > 0, train.gram.diagonal(), 1)  # unused ranks stay zeros
    for damping in DAMPINGS:
        root, failed = torch.linalg.cholesky_ex(train.gram + torch.diag(damping * pull))
        if int(failed):
            continue
        candidate = torch.cholesky_solve((train.cross + damping * pull * up).T, root).T
        error = held_out.error(candidate)
        if error < best.after:
            best = Fit(candidate, damping, before, error)
    return best
