"""What became of a matrix: as a step reports it, the journal keeps it, and svdconvert.json tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """What is known of a factored matrix W ~ BA.

    Attributes:
        rank: of BA.
        shape: ``(out, in)`` of W.
        relative_error: ||W - BA|| / ||W|| of the tensors as they are stored, Frobenius norm.
        optimal_error: the same of the best product in the method's metrics, before rounding. Where the fast solver
            was certified, the least that its certificate leaves possible.
        precision: ``float32`` or ``float64``, of the eigenproblem.
        rounding_excess: what the storage type adds to the loss in the method's metrics, relative to that loss before
            rounding, for independent rounding errors. None where nothing is lost before rounding, or it was not
            measured: where layers share a factor, and after a refit.
        basis: of two factors, the one in which they were rounded: ``singular vectors``, or a row of
            :data:`svdconvert.linalg.rounding.BASES`.
        solver: where the fast solver was tried, ``filtered``, or ``exact`` for a matrix that it could not certify.
        certificate: of the fast solver: by how much the error before rounding is estimated to exceed the least one at
            most, relative to that.
        whole, lost: with a decomposition, the sum of all squared singular values in the method's metrics, and of those
            cut off; of weights of few bits, the loss in the metrics of the product as it is stored.
        bits, groups: of each weight, where any is of few bits: bits of an entry, and neighbours that share a scale, 0
            for none or a scale for each row.
        output_error: ||(W - BA) C^1/2|| / ||W C^1/2||, the relative error of the layer's outputs on the calibration
            text, before rounding, where the second moments C of its inputs are known (whiten, kfac).
        predicted_loss: the loss added, nats per token, where the metrics are those of the loss (kfac).
        worth: what half of ``lost`` was multiplied with for that, measured token by token; None for 1.
        refit: what a refit did: ``damping`` and ``held_out_error`` before and after.
        shared_with: of a layer that uses the factor of another, that other's module path.
        seconds: time of the step; of layers that share, an equal part of it for each.
    """

    rank: int
    shape: tuple[int, int]
    relative_error: float
    optimal_error: float | None = None
    precision: str | None = None
    rounding_excess: float | None = None
    basis: str | None = None
    solver: str | None = None
    certificate: float | None = None
    whole: float | None = None
    lost: float | None = None
    output_error: float | None = None
    predicted_loss: float | None = None
    worth: float | None = None
    refit: Mapping[str, Any] | None = None
    shared_with: str | None = None
    bits: Sequence[int] | None = None
    groups: Sequence[int] | None = None
    seconds: float | None = None

    @property
    def energy_kept(self) -> float:
        """1 - relative_error^2."""
        return 1 - self.relative_error**2

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON types, those that are None left out but for ``rounding_excess``; and energy_kept."""
        told = {name: value for name, value in asdict(self).items() if value is not None or name == "rounding_excess"}
        return told | {"shape": list(self.shape), "energy_kept": self.energy_kept}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> MatrixReport:
        """The report of a journal or a record, of any version; fields of another version are left out."""
        known = {field.name: told[field.name] for field in fields(cls) if field.name in told}
        rows, columns = told["shape"]
        return cls(**known | {"shape": (rows, columns)})


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What is known of layers that share their input-side factor.

    Attributes:
        relative_error: of all of them, stacked.
        layers: of each, in the order of the group.
    """

    relative_error: float
    layers: tuple[MatrixReport, ...]

    def to_json(self) -> dict[str, Any]:
        """What the layers have in common, and under ``layers`` what each has of its own."""
        common = {"rank": self.layers[0].rank, "precision": self.layers[0].precision}
        layers = [layer.to_json() for layer in self.layers]
        own = [{name: value for name, value in layer.items() if name not in common} for layer in layers]
        return {**common, "relative_error": self.relative_error, "layers": own}


@dataclass(frozen=True, kw_only=True)
class RoundedReport:
    """What is known of a matrix that stays dense, in few bits.

    Attributes:
        shape: ``(out, in)``.
        bits, groups: as of :class:`MatrixReport`, of its one weight.
        relative_error: ||W - Q|| / ||W|| of the matrix as it is stored, Frobenius norm.
        whole, lost: in the method's metrics, what there was, and the loss of the matrix as it is stored; None of one
            that was healed.
        predicted_loss: the loss added, nats per token, where the metrics are those of the loss.
        worth: as of :class:`MatrixReport`.
        seconds: time of the step.
    """

    shape: tuple[int, int]
    bits: Sequence[int]
    groups: Sequence[int]
    relative_error: float
    whole: float | None = None
    lost: float | None = None
    predicted_loss: float | None = None
    worth: float | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields in JSON types, those that are None left out."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return told | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> RoundedReport:
        """The report of a journal or a record; fields of another version are left out."""
        known = {field.name: told[field.name] for field in fields(cls) if field.name in told}
        rows, columns = told["shape"]
        return cls(**known | {"shape": (rows, columns)})


@dataclass(frozen=True, kw_only=True)
class PlainReport:
    """What is known of a step that truncates nothing.

    Attributes:
        rank: of the product that it read or made; None where there is none.
    """

    rank: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The rank, if there is one."""
        return {} if self.rank is None else {"rank": self.rank}


def matrix_reports(told: Mapping[str, Any], modules: Sequence[str]) -> dict[str, MatrixReport]:
    """Module path -> report of its matrix, from the journal's report of a step.

    Args:
        told: :meth:`MatrixReport.to_json`, or :meth:`GroupReport.to_json` of several layers, with its ``seconds``.
        modules: of the step, the owner of a shared factor first.
    """
    if len(modules) == 1:
        return {modules[0]: MatrixReport.from_json(told)}
    seconds = round(told["seconds"] / len(modules), 4)
    reports = {
        module: MatrixReport.from_json({**told, **layer, "seconds": seconds})
        for module, layer in zip(modules, told["layers"], strict=True)
    }
    owner, *others = modules
    return {owner: reports[owner]} | {module: replace(reports[module], shared_with=owner) for module in others}
