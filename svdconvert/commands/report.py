"""What a conversion did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdconvert.jobs.job import Outcome
from svdconvert.planning.plan import Plan

# Of svdconvert.json, what a model has lost on its text.
LOSSES = ("predicted_loss", "dense_loss", "measured_loss", "refit")


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
        """Module path -> what svdconvert.json tells about the matrix.

        rank, shape ``[out, in]``, precision (of the eigenproblem), seconds; relative_error, ||W - BA|| / ||W|| of the
        stored factors, optimal_error, the same of the best product in the method's metrics, before rounding,
        energy_kept, 1 - relative_error^2; rounding_excess, what the storage type adds to the loss in the method's
        metrics, relative to what it is before rounding (of independent rounding errors), and for two factors basis,
        the one that was rounded (``singular vectors``, or a row of :data:`svdconvert.linalg.rounding.BASES`). Where the
        fast solver was tried: solver, ``filtered`` with its certificate, by how much the error before rounding is
        estimated to be above the least one at most, relative to it (optimal_error is then the least that this leaves
        possible),
        or ``exact``, where it could not be certified and the matrix was solved exactly. With decompositions:
        whole and lost, the sum of the squared singular values in the method's metrics and of those cut off. Where the
        second moments C of the layer's inputs are known (whiten, kfac): output_error, ||(W - BA) C^1/2|| / ||W C^1/2||,
        the relative error of its outputs on the calibration text, before rounding. Where the metrics are those of the
        loss (kfac): predicted_loss, the loss added, nats per token. Of a layer that uses the factor of another:
        shared_with, that other's module path.
        """
        matrices: Mapping[str, Mapping[str, Any]] = self.outcome.record["matrices"]
        return matrices

    @property
    def errors(self) -> list[float]:
        """Relative error of every factored matrix, Frobenius norm."""
        return [float(matrix["relative_error"]) for matrix in self.matrices.values()]

    def to_json(self) -> dict[str, Any]:
        """The report in JSON types, for ``--json``."""
        outcome = self.outcome
        return {
            "folder": str(self.folder),
            "plan": self.plan.to_json(),
            "matrices": {name: dict(matrix) for name, matrix in self.matrices.items()},
            "seconds": round(outcome.seconds, 3),
            "peak_memory_bytes": outcome.peak_memory_bytes,
            "peak_device_bytes": outcome.peak_device_bytes,
            "resumed": outcome.resumed,
            "already_done": outcome.already_done,
            "settings": dict(outcome.record["settings"]),
            "losses": {name: outcome.record[name] for name in LOSSES if name in outcome.record},
            "checks": list(outcome.checks),
            "url": self.url,
        }
