"""The solvers by name, and what became of matrices that one was tried on, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdconvert.solvers.exact import Exact
from svdconvert.solvers.fast import Fast
from svdconvert.solvers.row import Solver

SOLVERS: Mapping[str, Solver] = {row.name: row for row in (Exact(), Fast())}
DEFAULT_SOLVER = SOLVERS["exact"]

NOT_ON_A_GPU = "the fast solver has not been measured on a GPU, so all matrices are solved exactly"


def done(matrices: Sequence[Mapping[str, Any]]) -> str:
    """What became of them, in words.

    Args:
        matrices: what svdconvert.json tells about each, see :attr:`svdconvert.Report.matrices`.
    """
    certificates = [matrix["certificate"] for matrix in matrices if matrix.get("solver") == "filtered"]
    redone = sum(matrix.get("solver") == "exact" for matrix in matrices)
    text = f"{len(certificates)} of {len(matrices)} matrices"
    if certificates:
        text += f", estimated to be at most {max(certificates):.1e} above the least error, relative to it"
    if redone:
        text += f"; {redone} more could not be certified and were solved exactly"
    return text
