"""The singular values of a model's matrices, and the numbers that sum them up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import DEFAULT_LAYOUT
from svdconvert.names import kind
from svdconvert.words import percent

Array = NDArray[np.float64]

# Shares of the energy whose ranks are shown.
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
    layout: Layout = DEFAULT_LAYOUT

    @property
    def kind(self) -> str:
        """The module's name within its block."""
        return kind(self.module)

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
        kinds: dict[tuple[str, tuple[int, int]], list[MatrixSpectrum]] = {}
        for matrix in self.matrices:
            kinds.setdefault((matrix.kind, matrix.shape), []).append(matrix)
        return kinds

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


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
