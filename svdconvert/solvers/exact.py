"""``exact``: the best product, by the eigenvectors of a Gram matrix (``linalg/exact.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdconvert.solvers.row import Solver

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdconvert.linalg.panels import Workspace
    from svdconvert.linalg.results import Factors


class Exact(Solver):
    """The default."""

    name = "exact"
    eigenproblem = 10
    single_plain_only = False

    def acts(self, shape: tuple[int, int], rank: int) -> bool:
        """Never: it is the default itself."""
        return False

    def factorize(self, weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace) -> Factors:
        from svdconvert.linalg.exact import factorize

        return factorize(weight, rank, dtype, workspace)
