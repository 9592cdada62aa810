"""The solvers by name, and what became of matrices that one was tried on, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdconvert.errors import InputError
from svdconvert.methods.table import method_named
from svdconvert.solvers.exact import Exact
from svdconvert.solvers.fast import Fast
from svdconvert.solvers.row import Solver

SOLVERS: Mapping[str, Solver] = {row.name: row for row in (Exact(), Fast())}
DEFAULT_SOLVER = SOLVERS["exact"]

NOT_ON_A_GPU = "the fast solver has not been measured on a GPU, so all matrices are solved exactly"


def check_solver(
    solver: str,
    method: str,
    *,
    share_layers: int = 1,
    allocation: str | None = None,
    refit: str = "none",
    keeps: bool = False,
) -> None:
    """See that a solver is there, and that the rest of a request is what the fast one is for: plain truncations.

    Args:
        solver: one of :data:`SOLVERS`.
        method: row of :data:`svdconvert.methods.table.METHODS`.
        share_layers, allocation, refit: as :func:`svdconvert.convert` takes them.
        keeps: whether whole decompositions are kept.

    Raises:
        InputError: it is unknown, or does not go with something.
    """
    if solver not in SOLVERS:
        raise InputError(f"--solver {solver!r} is unknown; choose {' or '.join(SOLVERS)}")
    others = {
        f"--method {method}": bool(method_named(method).statistics),
        f"--share-layers {share_layers}": share_layers != 1,
        "--allocation global": allocation == "global",
        f"--refit {refit}": refit != "none",
        "--work or --keep-work": keeps,
    }
    asked = next((option for option, given in others.items() if given), None)
    if solver == "fast" and asked:
        raise InputError(
            f"--solver fast is for plain SVD of single matrices and does not go with {asked}; leave one of them out"
        )


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
