"""What a model's matrices look like to a method: singular values, how they fall off, and what break-even keeps of them.

The singular values are those of L^1/2 W R^1/2, with the method's metrics L and R on outputs and inputs
(``linalg/exact.py``); of W itself for plain SVD. Their squares are the energy, and what a truncation cuts off of it is
its loss.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svdconvert.calibration.knowledge import Calibration, check_knowledge, check_parts, default_method, find_knowledge
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import DEFAULT, layout_named
from svdconvert.machine.devices import resolve_device
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.methods.table import method_named, method_options
from svdconvert.names import suffix
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import find_targets
from svdconvert.storage import locks
from svdconvert.storage.opening import open_source
from svdconvert.words import percent

if TYPE_CHECKING:
    import torch

    from svdconvert.linalg.metrics import Metric
    from svdconvert.linalg.results import Decomposition

    Array = NDArray[np.float64]

# Shares of the energy whose ranks are told.
SHARES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, eq=False)
class MatrixSpectrum:
    """The singular values of one matrix.

    Attributes:
        module: path of its linear layer, for example ``layers.0.attention.dense``.
        shape: ``(out, in)``.
        energies: [k] float64, descending: squared singular values, k = min(shape).
        outputs: [k + 1] float64: mean squared error of the layer's outputs on the calibration text at every rank from
            0 to k, before rounding; None where the second moments of its inputs are not known.
        layout: how a product would be stored.
    """

    module: str
    shape: tuple[int, int]
    energies: Array
    outputs: Array | None
    layout: Layout = DEFAULT

    @property
    def kind(self) -> str:
        """The module's name within its block."""
        return suffix(self.module)

    @cached_property
    def energy(self) -> Array:
        """[k + 1]: share of the energy that the largest r singular values hold, for r = 0 to k."""
        total = self.energies.sum()
        sums = np.concatenate([[0.0], np.cumsum(self.energies)])
        return sums / total if total > 0 else np.ones_like(sums)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of s / sum(s) (Roy and Vetterli, 2007): k for a flat spectrum, 1 for a single value."""
        values = np.sqrt(self.energies)
        total = values.sum()
        if total == 0:
            return 0.0
        shares = values[values > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def stable_rank(self) -> float:
        """sum(s^2) / max(s)^2."""
        return float(self.energies.sum() / self.energies[0]) if self.energies[0] > 0 else 0.0

    def rank_at(self, share: float) -> int:
        """The least rank that holds a share of the energy."""
        # The allowance is for the rounding of sums: all of it is reached where nothing but that is missing.
        return int(np.searchsorted(self.energy, share - 1e-12))

    @property
    def break_even(self) -> float:
        """The rank from which on nothing is saved."""
        return self.layout.break_even(self.shape)

    @property
    def highest_saving(self) -> int:
        """The highest rank that saves something; 0 if there is none."""
        return self.layout.highest_rank(self.shape, self.shape[0] * self.shape[1] - 1)

    @property
    def break_even_energy(self) -> float:
        """Share of the energy at the highest rank that saves something."""
        return float(self.energy[self.highest_saving])

    @property
    def output_errors(self) -> Array | None:
        """[k + 1]: ||(W - W_r) C^1/2|| / ||W C^1/2|| for r = 0 to k, where C = E[x x^T] is known."""
        if self.outputs is None:
            return None
        whole = self.outputs[0]
        errors: Array = np.sqrt(self.outputs / whole) if whole > 0 else np.zeros_like(self.outputs)
        return errors

    @property
    def break_even_output_error(self) -> float | None:
        """Relative error of the outputs at the highest rank that saves something."""
        errors = self.output_errors
        return None if errors is None else float(errors[self.highest_saving])

    def to_json(self) -> dict[str, Any]:
        """One entry of ``matrices``, see :meth:`Spectra.to_json`."""
        errors = self.output_errors
        return {
            "shape": list(self.shape),
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "rank_at_energy": {f"{share:.2f}": self.rank_at(share) for share in SHARES},
            "break_even": self.break_even,
            "energy_at_break_even": self.break_even_energy,
            "singular_values": _short(np.sqrt(self.energies)),
            **({} if errors is None else {"output_errors": _short(errors)}),
        }


@dataclass(frozen=True)
class Spectra:
    """The singular values of a model's linear layers.

    Attributes:
        model: its name.
        commit: its commit on the Hub, or None.
        method: row of :data:`svdconvert.methods.table.METHODS`, whose metrics they are in.
        options: the method's settings.
        layout: row of :data:`svdconvert.layouts.table.LAYOUTS`, for the break-even ranks.
        calibration: where the statistics came from and what they depend on; None for a method without any.
        matrices: by layer, then in the architecture's order.
    """

    model: str
    commit: str | None
    method: str
    options: Mapping[str, float]
    layout: str
    calibration: Mapping[str, Any] | None
    matrices: Sequence[MatrixSpectrum]

    @property
    def kinds(self) -> dict[tuple[str, tuple[int, int]], list[MatrixSpectrum]]:
        """The matrices by name within the block and shape."""
        found: dict[tuple[str, tuple[int, int]], list[MatrixSpectrum]] = {}
        for matrix in self.matrices:
            found.setdefault((matrix.kind, matrix.shape), []).append(matrix)
        return found

    @property
    def headline(self) -> str:
        """The gist in one sentence."""
        share = median(matrix.rank_at(0.95) / len(matrix.energies) for matrix in self.matrices)
        kept = median(matrix.break_even_energy for matrix in self.matrices)
        count = len(self.matrices)
        return (
            f"95% of the energy takes {share:.0%} of the ranks; at break-even a product keeps {percent(kept)} of it "
            f"(medians of {count} {'matrix' if count == 1 else 'matrices'})"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON types.

        ``model``, ``commit``, ``method``, ``options``, ``layout``, ``calibration`` as the attributes, and ``matrices``:
        module path -> ``shape`` [out, in]; ``effective_rank``; ``stable_rank``; ``rank_at_energy``, the least ranks
        that hold 0.90, 0.95 and 0.99 of the energy; ``break_even``, the rank from which on nothing is saved;
        ``energy_at_break_even``, the share that the highest saving rank holds; ``singular_values``, min(shape) numbers
        in descending order; and, where the inputs are known, ``output_errors``, the relative error of the outputs at
        ranks 0 to min(shape). Lists are rounded to 7 digits.
        """
        return {
            "model": self.model,
            "commit": self.commit,
            "method": self.method,
            "options": dict(self.options),
            "layout": self.layout,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "matrices": {matrix.module: matrix.to_json() for matrix in self.matrices},
        }


def spectrum(
    model: str | os.PathLike[str],
    *,
    method: str | None = None,
    calibration: Calibration | None = None,
    stats: str | os.PathLike[str] | None = None,
    targets: Sequence[str] = (),
    split_fused: bool = False,
    layout: str = DEFAULT.name,
    alpha: float | None = None,
    shrinkage: float | None = None,
    work: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    device: str = "auto",
    events: Events | None = None,
) -> Spectra:
    """Singular values of a dense model's linear layers, in a method's metrics.

    One matrix is in memory at a time, and of a data-aware method's statistics those of one block.

    Args:
        model, method, calibration, stats, targets, split_fused, alpha, shrinkage, revision, device, events: see
            :func:`svdconvert.convert`.
        layout: what break-even is told for.
        work: folder that keeps the decompositions, for a conversion with the same; what is there is not computed
            again. Without it nothing is kept.

    Raises:
        InputError: the model, the text or the folder cannot be used.
        JobError: it broke off; with ``work`` the same call continues it.
    """
    from svdconvert.factoring.decompose import decompose_all, kept_decompositions
    from svdconvert.models.preflight import check_model

    events = events or Events()
    method = default_method(method, calibration, stats)
    row, stored = method_named(method), layout_named(layout)
    options = method_options(row, {"alpha": alpha, "shrinkage": shrinkage})
    check_knowledge(row, calibration, stats)
    check_parts(row, collected=stats is not None, split_fused=split_fused)
    used = resolve_device(device)
    with ExitStack() as stack:
        place = stack.enter_context(temporary_folder()) if work is None else Path(work).expanduser()
        source = open_source(os.fspath(model), revision, download_folder=place / "source")
        chosen = find_targets(source, targets, split_fused=split_fused)
        check_model(source)
        if work is not None:
            stack.enter_context(locks.working(place))
        if stats is not None:
            stack.enter_context(locks.collected(Path(stats).expanduser()))
        knowledge = find_knowledge(source, calibration, stats, events)
        if method != row.name:
            events.note(f"{method} has the same optimum as {row.name}, which computes it")
        found = _Values()
        if work is None:
            decompose_all(source, chosen, row, options, knowledge, found, place / "statistics", used, events)
        else:
            kept = kept_decompositions(source, chosen, row, options, knowledge, place, used, events)
            for target in chosen:
                found.take(target.module, kept.spectrum(target), kept.outputs(target))
            shutil.rmtree(place / "source", ignore_errors=True)
    told = None if knowledge is None else {"name": knowledge.name, **knowledge.key}
    return Spectra(
        model=source.name,
        commit=source.commit,
        method=row.name,
        options=options,
        layout=stored.name,
        calibration=told,
        matrices=[MatrixSpectrum(t.module, t.shape, *found.of[t.module], stored) for t in chosen],
    )


class _Values:
    """Takes of every decomposition what is told about it, and lets the rest go."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[Array, Array | None]] = {}

    def has(self, target: Target) -> bool:
        return target.module in self.of

    def save(
        self, target: Target, found: Decomposition, inner: Metric, outer: Metric, outputs: torch.Tensor | None
    ) -> None:
        self.take(target.module, found.spectrum, outputs)

    def take(self, module: str, spectrum: torch.Tensor, outputs: torch.Tensor | None) -> None:
        self.of[module] = (spectrum.cpu().numpy(), None if outputs is None else outputs.cpu().numpy())


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
