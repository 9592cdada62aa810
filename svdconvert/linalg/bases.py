"""Which basis of a truncation loses least when it is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import PANEL, Scaled
from svdconvert.linalg.partner import partner, pseudo_inverse
from svdconvert.linalg.precision import refuse_overflowing_factor
from svdconvert.linalg.products import product
from svdconvert.linalg.results import SINGULAR, Decomposition
from svdconvert.linalg.rounding import BASES, SMALLEST_SHARE, round_with_feedback

# A share of the truncation's own loss that rounding may add without other bases being tried.
NEGLIGIBLE_EXCESS = 1e-4


@dataclass(frozen=True)
class _Rounded:
    """Factors in the storage type, [k, r] and [m, r] or [r, n]; their loss in the metrics; the name of their basis."""

    small: Tensor
    large: Tensor
    loss: float
    basis: str


class Rounding:
    """The ways to round a truncation in a pair of metrics.

    The larger factor solves the normal equations before it is rounded, so that the loss is the sum of two: what the
    rounded smaller factor cannot span, and what rounding the larger one adds. With S the smaller factor at full rank,
    the first is |(1 - Pi) S|^2 in the inner metric, Pi the projection onto the rounded factor. The leading columns'
    part of it is formed, as it is small; that of the others is what the truncation loses less |Pi S|^2 of them.
    """

    def __init__(
        self, matrix: Scaled, found: Decomposition, rank: int, dtype: torch.dtype, outer: Metric, inner: Metric
    ) -> None:
        self.matrix, self.dtype, self.outer, self.inner = matrix, dtype, outer, inner
        scaled = found.basis if inner is not None else found.basis * found.values.clamp_min(0).sqrt()
        self.first, self.others = scaled[:, -rank:], scaled[:, :-rank]
        self.sigma = found.values[-rank:].flip(0).clamp_min(0).sqrt()
        self.tail = float(found.values[:-rank].clamp_min(0).sum())
        self.leading = found.basis[:, -rank:].flip(1)
        self.weighted = apply_metric(inner, self.leading)
        self.partner = self._long(partner(matrix, pseudo_inverse(self.leading, self.weighted)))

    def best(self) -> _Rounded:
        """The one of the smallest loss; others than the singular vectors are tried where those lose much."""
        chosen = self._round(SINGULAR, self.leading, self.partner)
        refuse_overflowing_factor(chosen.small)
        if self.dtype.itemsize > 2 or len(self.sigma) < 2 or chosen.loss <= (1 + NEGLIGIBLE_EXCESS) * self.tail:
            return chosen
        # Both factors with columns that are orthonormal in their metrics.
        norms = (self.leading * self.weighted).sum(dim=0).clamp_min(0).sqrt()
        norms = norms.clamp_min(max(float(norms.max()) * SMALLEST_SHARE, torch.finfo(norms.dtype).tiny))
        floor = max(float(self.sigma[0]) * SMALLEST_SHARE, torch.finfo(self.sigma.dtype).tiny)
        small, large = self.leading / norms, self.partner * (norms / self.sigma.clamp_min(floor))
        for name, mix in BASES.items():
            x, y = mix(self.sigma)
            found = self._round(name, product(small, y), product(large, x), x)
            if found.loss < chosen.loss and bool(torch.isfinite(found.large).all()):
                chosen = found
        return chosen

    def _round(self, name: str, small: Tensor, large: Tensor, mixing: Tensor | None = None) -> _Rounded:
        """Round the factors of a product, [k, r] and [long side, r], balanced."""
        lengths = torch.linalg.vector_norm(large, dim=0)
        lengths = (lengths / torch.linalg.vector_norm(small, dim=0).clamp_min(torch.finfo(small.dtype).tiny)).sqrt()
        if mixing is None:
            first = (small * lengths).to(self.dtype)
        else:
            mixing = mixing / lengths.clamp_min(torch.finfo(small.dtype).tiny)
            first = round_with_feedback(small * lengths, product(mixing.T, mixing), self.dtype)
        lifted = first.to(small.dtype)
        weighted = apply_metric(self.inner, lifted)
        solved = pseudo_inverse(lifted, weighted)
        best = self._long(partner(self.matrix, solved))
        gram = product(lifted.T, weighted)
        second = best.to(self.dtype) if mixing is None else round_with_feedback(best, gram, self.dtype)
        lost = self.first - product(lifted, product(solved, self.first))
        loss = self.tail + float((lost * apply_metric(self.inner, lost)).sum())
        loss -= float((product(solved, self.others) * product(weighted.T, self.others)).sum())
        # A diagonal metric lets the rows be taken a panel at a time, so that no further copies of the factor are made.
        step = PANEL if self.outer is None or self.outer.dim() == 1 else best.shape[0]
        for start in range(0, best.shape[0], step):
            part = slice(start, start + step)
            error = second[part].to(best.dtype) - best[part]
            metric = self.outer[part] if self.outer is not None and self.outer.dim() == 1 else self.outer
            loss += float((product(error, gram) * apply_metric(metric, error)).sum())
        return _Rounded(first, self._long(second).contiguous(), max(loss, 0.0), name)

    def _long(self, factor: Tensor) -> Tensor:
        """The larger factor as [long side, r], or back."""
        return factor if self.matrix.tall else factor.T
