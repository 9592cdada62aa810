"""A conversion under way: what the stages of one have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdconvert.calibration.knowledge import Knowledge
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.planning.events import Events
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.source import Source


@dataclass(frozen=True)
class Work:
    """A conversion under way.

    Attributes:
        source: the dense model.
        request: what to do, settled.
        knowledge: the calibration text and its statistics, or None.
        folder: where the result goes.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        events: receiver of progress.
        healed_on: the text that the result is healed on, or None.
    """

    source: Source
    request: Conversion
    knowledge: Knowledge | None
    folder: Path
    device: str
    events: Events
    healed_on: Knowledge | None = None

    @property
    def kept(self) -> Path | None:
        """The folder that keeps statistics and decompositions for other runs; None for none."""
        return kept_work(self.folder) if self.request.runtime.keep_work else self.request.runtime.work

    @property
    def place(self) -> Path:
        """Where statistics and decompositions are: the folder that keeps them, or the job's own."""
        return self.kept or self.job / "work"

    @property
    def must_decompose(self) -> bool:
        """Whether the result is made from whole decompositions, kept or not."""
        request = self.request
        return bool(request.method.statistics) or self.chooses or request.size.rounds or request.recipe.refit != "none"

    @property
    def chooses(self) -> bool:
        """Whether the ranks are chosen once the singular values are known."""
        return self.request.allocation != "uniform" or self.request.size.limit is not None

    @property
    def measures(self) -> bool:
        """Whether they are chosen by what is measured on compressed models."""
        return self.request.allocation == "measured" or self.request.size.limit is not None

    @property
    def decomposes(self) -> bool:
        """Whether matrices are decomposed before they are truncated."""
        return self.must_decompose or self.kept is not None

    @property
    def job(self) -> Path:
        """The folder of what the job needs until it is done."""
        return self.folder / JOB_FOLDER


def kept_work(folder: Path) -> Path:
    """The folder that ``keep_work`` stands for."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-work")
