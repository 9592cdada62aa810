"""The solvers by name."""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.solvers.exact import Exact
from svdconvert.solvers.fast import Fast
from svdconvert.solvers.row import Solver

SOLVERS: Mapping[str, Solver] = {row.name: row for row in (Exact(), Fast())}
DEFAULT_SOLVER = SOLVERS["exact"]
