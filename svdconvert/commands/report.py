"""What a conversion did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.jobs.job import Outcome
from svdconvert.planning.plan import Plan

# Of svdconvert.json, what a model has lost on its text.
LOSSES = ("predicted_loss", "dense_loss", "measured_loss", "refit", "budget")


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        plan: the conversion as planned.
        outcome: time, memory and record of the run.
        url: where the result was pushed to, or None.
    """

    plan: Plan
    outcome: Outcome
    url: str | None = None

    @property
    def folder(self) -> Path:
        """Where the result is."""
        return self.outcome.folder

    @property
    def matrices(self) -> Mapping[str, Mapping[str, Any]]:
        """Module path -> what svdconvert.json tells about the matrix, in JSON types.

        The fields of :class:`svdconvert.MatrixReport` and ``energy_kept``; those that do not apply are missing.
        :meth:`svdconvert.MatrixReport.from_json` makes an object of it.
        """
        matrices: Mapping[str, Mapping[str, Any]] = self.outcome.record["matrices"]
        return matrices

    @property
    def training_free(self) -> Mapping[str, Any]:
        """What svdconvert.json tells of the conversion itself: all, or, where healing followed, what was before it."""
        record = self.outcome.record
        found: Mapping[str, Any] = record.get("training_free", record)
        return found

    @property
    def rounded(self) -> Mapping[str, Mapping[str, Any]]:
        """Module path -> what svdconvert.json tells about a matrix that stays dense in few bits, in JSON types.

        The fields of :class:`svdconvert.factoring.matrix_report.RoundedReport`.
        """
        rounded: Mapping[str, Mapping[str, Any]] = self.outcome.record.get("rounded", {})
        return rounded

    @property
    def errors(self) -> list[float]:
        """Relative error of every matrix that was factored or rounded to few bits, Frobenius norm."""
        return [float(matrix["relative_error"]) for matrix in (*self.matrices.values(), *self.rounded.values())]

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types, for ``--json``."""
        outcome = self.outcome
        return {
            "folder": str(self.folder),
            "plan": self.plan.to_json(),
            "matrices": {name: dict(matrix) for name, matrix in self.matrices.items()},
            **({"rounded": {name: dict(one) for name, one in self.rounded.items()}} if self.rounded else {}),
            "seconds": round(outcome.seconds, 3),
            "peak_memory_bytes": outcome.peak_memory_bytes,
            "peak_device_bytes": outcome.peak_device_bytes,
            "resumed": outcome.resumed,
            "already_done": outcome.already_done,
            "settings": dict(outcome.record["settings"]),
            "losses": {name: self.training_free[name] for name in LOSSES if name in self.training_free},
            **({"healing": outcome.record["healing"]} if "healing" in outcome.record else {}),
            "checks": list(outcome.checks),
            "url": self.url,
        }
