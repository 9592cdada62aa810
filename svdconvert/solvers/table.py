"""The fast solver (``linalg/filtered.py``) as a choice: where it acts, what it does not go with, what it has done.

No torch, since a plan tells of it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdconvert.errors import InputError
from svdconvert.methods.table import method_named

SOLVERS = ("exact", "fast")

# Where the fast solver is at least 1.5 times as fast as the exact one by tests/benchmarks/filtered.py, at hidden sizes
# of 256 to 3072 (docs/measurements.md, "The fast solver"): ranks up to these shares of the smaller side. The Gram
# matrix, which both need, is cheapest where the matrix is square.
LARGEST_SHARE = 1 / 12
LARGEST_SHARE_SQUARE = 1 / 8

# At 768, a twelfth is only 1.4 times as fast.
LEAST_SIDE = 1024

NOT_ON_A_GPU = "the fast solver has not been measured on a GPU, so all matrices are solved exactly"


def acts(shape: tuple[int, int], rank: int) -> bool:
    """Whether the fast solver is tried on a matrix: where it is known to be at least 1.5 times as fast.

    Args:
        shape: of the matrix.
        rank: of the product.
    """
    k = min(shape)
    return k >= LEAST_SIDE and rank <= k * (LARGEST_SHARE_SQUARE if shape[0] == shape[1] else LARGEST_SHARE)


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
