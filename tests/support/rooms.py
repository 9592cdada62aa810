"""The rooms of the package, and what lies beside them."""

from __future__ import annotations

from pathlib import Path

import svdconvert

PACKAGE = Path(svdconvert.__file__).parent

# From the ground up. `docs/architecture.md` draws them.
ROOMS = (
    "families linalg layouts methods machine storage solvers settings models planning calibration factoring healing "
    "jobs reports commands cli"
).split()

# Beside the rooms: what all of them may use, and what uses all of them.
GROUND = frozenset("errors fields foreign grids modeling names nats paths sentences tensors version words".split())
ROOF = frozenset(["", "__main__", "program"])
