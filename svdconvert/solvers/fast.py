"""``fast``: nearly the best product, certified, by a filtered subspace (``linalg/filtered.py``), where that pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    cpu_only = "the fast solver has not been measured on a GPU, so all matrices are solved exactly"

    def acts(self, shape: tuple[int, int], rank: int) -> bool:
        """Where it is known to be at least 1.5 times as fast as the exact one."""
        k = min(shape)
        return k >= LEAST_SIDE and rank <= k * (LARGEST_SHARE_SQUARE if shape[0] == shape[1] else LARGEST_SHARE)

    def factorize(self, weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace) -> Factors:
        from svdconvert.linalg.filtered import factorize_fast

        return factorize_fast(weight, rank, dtype, workspace)

    def planned(self, count: int, of: int) -> str:
        if count == of:
            return f"fast solver (on the CPU): all {count} matrices"
        others = "the others are too small, or their ranks too high, for it to pay"
        return f"fast solver (on the CPU): {count} of {of} matrices; {others}"

    def done(self, matrices: Sequence[Mapping[str, Any]]) -> str:
        certificates = [matrix["certificate"] for matrix in matrices if matrix.get("solver") == "filtered"]
        redone = sum(matrix.get("solver") == "exact" for matrix in matrices)
        text = f"{len(certificates)} of {len(matrices)} matrices"
        if certificates:
            text += f", estimated to be at most {max(certificates):.1e} above the least error, relative to it"
        if redone:
            text += f"; {redone} more could not be certified and were solved exactly"
        return text
