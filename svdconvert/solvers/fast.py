"""``fast``: nearly the best product, certified, by a filtered subspace (``linalg/filtered.py``), where that pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svdconvert.solvers.row import Solver

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdconvert.linalg.panels import Workspace
    from svdconvert.linalg.results import Factors

# Where it is at least 1.5 times as fast as the exact one by tests/benchmarks/filtered.py, at hidden sizes of 256 to
# 3072 (docs/measurements-solver.md): ranks up to these shares of the smaller side. The Gram matrix, which
# both need, is cheapest where the matrix is square.
LARGEST_SHARE = 1 / 12
LARGEST_SHARE_SQUARE = 1 / 8

# At 768, a twelfth is only 1.4 times as fast.
LEAST_SIDE = 1024


class Fast(Solver):
    """Whatever it cannot certify is solved exactly."""

    name = "fast"
    eigenproblem = 3
    single_plain_only = True

    def acts(self, shape: tuple[int, int], rank: int) -> bool:
        """Where it is known to be at least 1.5 times as fast as the exact one."""
        k = min(shape)
        return k >= LEAST_SIDE and rank <= k * (LARGEST_SHARE_SQUARE if shape[0] == shape[1] else LARGEST_SHARE)

    def factorize(self, weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace) -> Factors:
        from svdconvert.linalg.filtered import factorize_fast

        return factorize_fast(weight, rank, dtype, workspace)
