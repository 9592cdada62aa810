"""What a model's matrices look like to a method: singular values, how they fall off, and what break-even keeps of them.

The singular values are those of L^1/2 W R^1/2, with the method's metrics L and R on outputs and inputs
(``linalg/exact.py``); of W itself for plain SVD. Their squares are the energy, and what a truncation cuts off of it is
its loss.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from svdconvert.calibration.knowledge import Calibration, find_knowledge
from svdconvert.commands.spectra import Array, MatrixSpectrum, Spectra
from svdconvert.layouts.table import DEFAULT_LAYOUT, layout_named
from svdconvert.machine.devices import resolve_device
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import find_targets
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.text import Stats
from svdconvert.storage import locks
from svdconvert.storage.opening import open_source

if TYPE_CHECKING:
    import torch

    from svdconvert.linalg.metrics import Metric
    from svdconvert.linalg.results import Decomposition


def spectrum(
    model: str | os.PathLike[str],
    *,
    method: str | None = None,
    calibration: Calibration | None = None,
    stats: str | os.PathLike[str] | None = None,
    targets: Sequence[str] = (),
    split_fused: bool = False,
    layout: str = DEFAULT_LAYOUT.name,
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
        layout: what the break-even ranks are for.
        work: folder that keeps the decompositions, for a conversion with the same; what is there is not computed
            again. Without it nothing is kept.

    Raises:
        InputError: the model, the text or the folder cannot be used.
        JobError: it broke off; with ``work`` the same call continues it.
    """
    from svdconvert.factoring.decompose import decompose_all, kept_decompositions
    from svdconvert.models.preflight import check_model

    events = events or Events()
    request = Conversion.of(
        method=method,
        layout=layout,
        alpha=alpha,
        shrinkage=shrinkage,
        calibration=calibration,
        stats=stats,
        split_fused=split_fused,
    )
    request.check_method()
    row, options, stored = request.method, request.options, layout_named(layout)
    used = resolve_device(device)
    with ExitStack() as stack:
        place = stack.enter_context(temporary_folder()) if work is None else user_path(work)
        source = open_source(path_or_text(model), revision, download_folder=place / "source")
        chosen = find_targets(source, targets, split_fused=split_fused)
        check_model(source)
        if work is not None:
            stack.enter_context(locks.working(place))
        if isinstance(request.calibration, Stats):
            stack.enter_context(locks.collected(request.calibration.folder))
        knowledge = find_knowledge(source, request.calibration, events, folder=place, device=used)
        if method not in (None, row.name):
            events.note(f"{method} has the same optimum as {row.name}, which computes it")
        values = _Values()
        if work is None:
            decompose_all(source, chosen, row, options, knowledge, values, place / "statistics", used, events)
        else:
            kept = kept_decompositions(source, chosen, row, options, knowledge, place, used, events)
            for target in chosen:
                values.take(target.module, kept.spectrum(target), kept.outputs(target))
            shutil.rmtree(place / "source", ignore_errors=True)
    return Spectra(
        model=source.name,
        commit=source.commit,
        method=row.name,
        options=options,
        layout=stored.name,
        calibration=None if knowledge is None else {"name": knowledge.name, **knowledge.key},
        matrices=[MatrixSpectrum(t.module, t.shape, *values.of[t.module], stored) for t in chosen],
    )


class _Values:
    """Keeps the singular values and output errors of every decomposition, and lets the rest go."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[Array, Array | None]] = {}

    def has(self, target: Target) -> bool:
        return target.module in self.of

    def save(
        self, target: Target, decomposition: Decomposition, inner: Metric, outer: Metric, outputs: torch.Tensor | None
    ) -> None:
        self.take(target.module, decomposition.spectrum, outputs)

    def take(self, module: str, spectrum: torch.Tensor, outputs: torch.Tensor | None) -> None:
        self.of[module] = (spectrum.cpu().numpy(), None if outputs is None else outputs.cpu().numpy())
