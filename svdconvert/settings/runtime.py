"""Where and how the work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.paths import user_path
from svdconvert.settings.row import SPEED, option


def folder_or_none(path: Any) -> Path | None:
    """A folder as a caller names it; ``~`` is the home folder."""
    return None if path is None else user_path(path)


@dataclass(frozen=True)
class Runtime:
    """The machine, and the folder of intermediate results.

    Attributes:
        device: ``auto`` (cuda if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        workers: matrices solved at the same time; None for as many as suit the machine.
        work: folder that keeps statistics and decompositions; None for the job's own.
        keep_work: whether they are kept beside the result.
    """

    device: str = option(
        "auto",
        "--device",
        "What computes; auto takes a GPU if there is one.",
        keyword="device",
        group="Running",
        kind="word",
        words=("auto", "cpu", "cuda", "cuda:N"),
        omitted_because=SPEED,
    )
    workers: int | None = option(
        None,
        "--workers",
        "Matrices solved at a time.",
        keyword="workers",
        group="Running",
        kind="count",
        usual="one a core, up to 8; two on a GPU",
        omitted_because=SPEED,
    )
    # What is kept is the decomposition of whole matrices, whose factors differ by rounding from those made at once.
    work: Path | None = option(
        None,
        "--work",
        "Folder that keeps statistics and decompositions for other runs.",
        keyword="work",
        group="Running",
        kind="folder",
        read=folder_or_none,
    )
    keep_work: bool = option(
        False,
        "--keep-work",
        "Keep statistics and decompositions beside the result: short for --work OUT-work.",
        keyword="keep_work",
        group="Running",
        kind="flag",
        omitted_because="told as --work",
    )

    @property
    def keeps(self) -> bool:
        """Whether decompositions are kept."""
        return self.keep_work or self.work is not None
