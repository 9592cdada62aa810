"""What is measured: a row is a way to compress, a line of data. Its name is what ``--only`` takes."""

from __future__ import annotations

from tests.benchmarks.quality import Row

# Predicted and measured loss are compared of this one, at more budgets than the others have.
LAW = Row("kfac, global, pivoted", "kfac", "global", "pivoted")

ROWS = (
    Row("svd, uniform", "svd", "uniform"),
    Row("whiten, uniform (SVD-LLM)", "whiten", "uniform"),
    Row("kfac, uniform", "kfac", "uniform"),
    Row("kfac, global", "kfac", "global"),
    LAW,
    Row("kfac, measured, pivoted", "kfac", "measured", "pivoted"),
    Row("kfac, measured, pivoted, refit", "kfac", "measured", "pivoted", refit="sequential"),
)
KEEPS = (0.8, 0.6)
LAW_KEEPS = (0.95, 0.9, 0.8, 0.7, 0.6)
