"""A metric on one side of a matrix."""

from __future__ import annotations

from torch import Tensor

from svdconvert.linalg.products import product

# Identity, the diagonal of a diagonal metric, or a symmetric positive semi-definite matrix.
Metric = Tensor | None


def apply_metric(metric: Metric, columns: Tensor) -> Tensor:
    """Metric times [k, r]."""
    if metric is None:
        return columns
    metric = metric.to(columns.dtype)
    return product(metric, columns) if metric.dim() == 2 else metric[:, None] * columns
