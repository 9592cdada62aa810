"""How factors are computed and stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.layouts.table import DEFAULT_LAYOUT, LAYOUTS
from svdconvert.methods.table import METHODS
from svdconvert.settings.row import option
from svdconvert.solvers.table import DEFAULT_SOLVER, SOLVERS

ALLOCATIONS = ("uniform", "global", "measured")
REFITS = ("none", "sequential")


@dataclass(frozen=True)
class Recipe:
    """The mathematics.

    Attributes:
        method: row of :data:`svdconvert.methods.table.METHODS` or another name of one; None for kfac where there is a
            text, else svd.
        layout: row of :data:`svdconvert.layouts.table.LAYOUTS`.
        solver: of plain truncations, one of :data:`svdconvert.solvers.table.SOLVERS`.
        alpha: exponent of asvd; None for its default.
        shrinkage: how far kfac and whiten pull their metrics towards the diagonal, 0 to 1; None for their defaults.
        allocation: how a budget is spread, one of :data:`ALLOCATIONS`; None for what the method does best with.
        refit: one of :data:`REFITS`.
    """

    method: str | None = option(
        None,
        "--method",
        "How the factors are computed.",
        keyword="method",
        group="Method",
        kind="method",
        words=tuple(METHODS),
        usual="kfac where there is a text, else svd",
    )
    layout: str = option(
        DEFAULT_LAYOUT.name,
        "--layout",
        "Two factors, or rows of each matrix and the coefficients of the others: more rank for the same size.",
        keyword="layout",
        group="Method",
        kind="choice",
        words=tuple(LAYOUTS),
    )
    solver: str = option(
        DEFAULT_SOLVER.name,
        "--solver",
        "fast: plain SVD at low ranks on the CPU 1.5 times as fast or more, at most 0.1% above the least error by its "
        "own estimate.",
        keyword="solver",
        group="Method",
        kind="choice",
        words=tuple(SOLVERS),
    )
    alpha: float | None = option(
        None,
        "--alpha",
        "Exponent of asvd.",
        keyword="alpha",
        group="Method",
        kind="number",
        usual="0.5",
    )
    shrinkage: float | None = option(
        None,
        "--shrinkage",
        "Pull the metrics of kfac and whiten towards their diagonal, 0 to 1.",
        keyword="shrinkage",
        group="Method",
        kind="number",
        usual="0.2 and 0",
    )
    allocation: str | None = option(
        None,
        "--allocation",
        "Spend a budget evenly, or where it helps most: by the singular values, which is for kfac and often hurts "
        "others, or corrected by what is measured on the compressed model. With bytes, measured makes a few ways to "
        "spend them and takes the one nearest to the dense model.",
        keyword="allocation",
        group="Method",
        kind="choice",
        words=ALLOCATIONS,
        usual="global for kfac, else uniform",
    )
    refit: str = option(
        "none",
        "--refit",
        "Fit outer factors to the dense model on the inputs that the compressed layers before them give.",
        keyword="refit",
        group="Method",
        kind="choice",
        words=REFITS,
    )

    @property
    def given(self) -> Mapping[str, float | None]:
        """The settings of methods, as given."""
        return {"alpha": self.alpha, "shrinkage": self.shrinkage}
