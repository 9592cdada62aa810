"""Progress of a running job. The base class is silent; ``cli/progress.py`` shows it on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from svdconvert.planning.steps import Step

if TYPE_CHECKING:
    from svdconvert.planning.plan import Plan


class Events:
    """Receiver of progress; every method may be called from any thread."""

    def planned(self, plan: Plan, free: int) -> None:
        """The plan is made; ``free`` is the room in bytes where the result goes. Nothing was read or written yet."""

    def begin(self, steps: Sequence[Step], done_before: int) -> None:
        """Work starts on these matrices; ``done_before`` more were done by an earlier run."""

    def solving(self, step: Step) -> None:
        """A matrix is being worked on."""

    def decomposed(self, step: Step) -> None:
        """The singular values and vectors of a matrix are computed; ranks are chosen later."""

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        """A matrix is done and written."""

    def shard(self, name: str, size: int) -> None:
        """A weight file is complete; size in bytes."""

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Progress within a long phase.

        ``writing text`` of a model's own text in tokens; ``embedding``, ``forward``, ``head`` and ``backward`` of a
        calibration in batches, ``refit``, ``measuring``, ``differentiating`` and ``dense model`` in blocks,
        ``rounding`` of a price list in matrices, ``healing`` in steps, ``judging`` of the start and of what became of
        it, ``tokens`` of a perplexity; a total of 0 is not known. ``detail`` says where in it the work is.
        """

    def note(self, text: str) -> None:
        """Something the user should know."""
