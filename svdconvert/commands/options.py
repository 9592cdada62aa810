"""What can be had of a model: dense in fewer bits, of lower rank, or both, in one table, from one calibration."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from svdconvert.calibration.knowledge import Calibration
from svdconvert.commands.budgets import spend
from svdconvert.commands.byte_budgets import BytePrices
from svdconvert.commands.heal_afterwards import with_texts
from svdconvert.commands.option_bench import OptionBench
from svdconvert.commands.option_checks import check_options
from svdconvert.commands.stages import decompose
from svdconvert.commands.ways import BYTES, DENSE, EVEN, RANK, Options, Way
from svdconvert.commands.work import Work
from svdconvert.errors import InputError
from svdconvert.families.table import dense_architecture
from svdconvert.machine.devices import resolve_device
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.bits import WHOLE, as_chosen
from svdconvert.planning.choices import TooFewBytes, alike
from svdconvert.planning.costs import costs_of
from svdconvert.planning.events import Events
from svdconvert.planning.fit import fitted, room_of
from svdconvert.planning.make import bytes_budget, make_plan, plan_for, plan_of_matrices
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.recipe import Recipe
from svdconvert.settings.row import options_of
from svdconvert.settings.size import Size
from svdconvert.settings.text import Stats
from svdconvert.storage import locks
from svdconvert.storage.opening import local_folder, open_source
from svdconvert.storage.source import Source
from svdconvert.tensors import DTYPES
from svdconvert.words import size as in_words

# Widths at which the dense model is rounded evenly, parts of the parameters kept by rank alone, and parts of the
# targets' 16-bit bytes.
BITS = (8, 4)
KEPT = (0.8, 0.6)
SHARES = (0.5, 0.35, 0.25, 0.18)
# Of rank alone the layout that buys most rank.
_PIVOTED = "pivoted"
# What is asked for first, for the matrices and the rules: any share has the same.
_ANY = 0.5


def options(
    model: str | os.PathLike[str],
    *,
    calibration: Calibration | None = None,
    stats: str | os.PathLike[str] | None = None,
    fit: str | int | None = None,
    fit_context: int | None = None,
    measure: str | os.PathLike[str] | None = None,
    window: int | None = None,
    targets: Sequence[str] = (),
    dtype: str = "keep",
    work: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    events: Events | None = None,
) -> Options:
    """What can be had of a model: dense in 8 and 4 bits, of lower rank, and both, with what each costs and saves.

    Predictions come of one calibration, one set of decompositions and one price list, by kfac's metrics, as those of
    :func:`convert` with ``bytes``; those of rank alone are made comparable with them by the same measured worths.

    Args:
        model, calibration, stats, targets, dtype, workers, revision, device, events: see :func:`convert`.
        fit: memory of a device, as of :func:`convert`; every way is then told to have room there or not.
        fit_context: likewise.
        measure: UTF-8 text file; every way is really made, measured on it, and removed: the log-perplexity that it
            adds, and KL(dense || it), in windows that do not overlap. It should not be the calibration's.
        window: tokens of a window; by default 2,048, or what the model reads.
        work: folder that keeps statistics, decompositions, price lists and what was measured, from which the same call
            and :func:`convert` go on; without it nothing is kept.

    Raises:
        InputError: the model, a text or the folder cannot be used.
        JobError: it broke off; with ``work`` the same call continues it.
    """
    keywords = {
        "calibration": calibration,
        "stats": stats,
        "targets": targets,
        "dtype": dtype,
        "workers": workers,
        "revision": revision,
        "device": device,
        "check": False,
    }
    check_options(model, given=calibration is not None, stats=stats, measure=measure, window=window)
    events, used = events or Events(), resolve_device(device)
    with ExitStack() as stack:
        place = stack.enter_context(temporary_folder()) if work is None else user_path(work)
        keywords["work"] = place
        request = Conversion.of(**keywords, bytes=_ANY)
        request.check()
        device_request = None if fit is None and fit_context is None else _device(keywords, fit, fit_context)
        source = open_source(path_or_text(model), revision, download_folder=place / "source")
        _refuse_others(source)
        fitting = None if device_request is None else fitted(source, device_request)
        room = None if fitting is None else room_of(source, fitting)
        plan = plan_of_matrices(source, request.settled())
        from svdconvert.models.preflight import check_model

        check_model(source)
        if work is not None:
            stack.enter_context(locks.working(place))
        if isinstance(request.calibration, Stats):
            stack.enter_context(locks.collected(request.calibration.folder))
        job = with_texts(Work(source, request.settled(), None, place / "options", used, events))
        assert job.knowledge is not None, "a rule of the request"
        bench = None
        if measure is not None:
            bench = OptionBench.of(job, local_folder(path_or_text(model), revision), user_path(measure), window)
        repeated = {**keywords, "work": work, "revision": revision}
        found = _Ways(job, plan, keywords, partial(_command, path_or_text(model), repeated), fitting, bench).every()
        dense = None if bench is None else bench.dense
        shutil.rmtree(job.folder, ignore_errors=True)  # the models are gone, and what they needed meanwhile
    return Options(
        model=source.name,
        calibration=f"{job.knowledge.text.tokens:,} tokens of {job.knowledge.name}",
        matrices=len(plan.targets),
        ways=found,
        text=None if measure is None else str(measure),
        tokens=0 if dense is None else dense["tokens"],
        perplexity=None if dense is None else dense["perplexity"],
        room=None if room is None else str(room),
    )


def _device(keywords: Mapping[str, Any], fit: str | int | None, context: int | None) -> Conversion:
    """A request for a device's size, checked."""
    if fit is None:
        raise InputError(
            f"{asked('fit_context', context)} has no effect without {asked('fit')}; give the memory as well"
        )
    request = Conversion.of(**keywords, fit=fit, fit_context=context)
    request.size.check()
    return request


def _refuse_others(source: Source) -> None:
    """Refuse what ranks and bits cannot be compared of."""
    row = dense_architecture(source.config, source.where)
    if row.transposed:
        raise InputError(
            f"{source.where} is a {row.model_type} model, which keeps its matrices transposed: there are no packed "
            "weights to compare ranks with; measure ranks alone with `svdconvert sweep`"
        )
    if row.has_experts(source.config):
        raise InputError(
            f"{source.where} is a mixture of experts, of which each token uses some: what ranks save of its "
            "multiplications is not counted yet; measure sizes with `svdconvert sweep`"
        )


def _named(budget: float) -> str:
    return in_words(budget) if isinstance(budget, int) else f"{budget:g}"


def _words(request: Conversion) -> str:
    """The options of a conversion that tell it from the others."""
    given = {Size: (request.size, ("keep", "bytes")), Recipe: (request.recipe, ("layout",))}
    return shlex.join(
        word
        for section, (values, names) in given.items()
        for name in names
        for word in options_of(section)[name].command(getattr(values, name))
    )


def _command(model: str, keywords: Mapping[str, Any], request: Conversion) -> str:
    """The whole command of a conversion.

    Args:
        model: as it was given.
        keywords: that all conversions have in common, as they were given.
        request: that tells it from the others.
    """
    own = {"bytes": request.size.bytes, "keep": request.size.keep, "layout": request.recipe.layout}
    return Conversion.of(**keywords, **{name: value for name, value in own.items() if value is not None}).command(model)


class _Ways:
    """Makes the ways."""

    def __init__(
        self,
        work: Work,
        plan: Plan,
        keywords: Mapping[str, Any],
        command: Callable[[Conversion], str],
        fitting: Conversion | None,
        bench: OptionBench | None,
    ) -> None:
        """Decompose, and price all dense choices.

        Args:
            work: a conversion by bytes.
            plan: of it, for its matrices.
            keywords: that all conversions have in common.
            command: the command of a conversion.
            fitting: a request for the size of a device; None without one.
            bench: measures ways; None where they are not measured.
        """
        self._work, self._keywords, self._fitting, self._bench = work, keywords, fitting, bench
        self._room = None if fitting is None else room_of(work.source, fitting)
        self._command = command
        self._row = dense_architecture(work.source.config, work.source.where)
        self._matrices = [replace(target, rank=None, grids=(), reason=WHOLE) for target in plan.targets]
        self._store = decompose(work, plan)
        self._prices = BytePrices.of(work, plan, self._store)

    def every(self) -> list[Way]:
        """All ways, kind after kind, from many bytes to few; budgets that cannot be met are left out, and told."""
        width = 8 * max(DTYPES[code][0] for code in self._prices.codes)
        makers: dict[str, Callable[[str], Way]] = {
            f"dense, {width} bits": self._dense,
            **{f"dense, {bits} bits": partial(self._alike, bits) for bits in BITS},
            **{f"rank alone, {keep:.0%} kept": partial(self._ranked, keep) for keep in KEPT},
            **{f"rank and bits, {_named(share)}": partial(self._in_bytes, share) for share in self._budgets()},
        }
        found = []
        for name, make in makers.items():
            try:
                found.append(make(name))
            except InputError as refusal:
                self._work.source.refuse_changed()  # then no way can be had
                # nobody asked for the sizes of the table, so there is nothing to be done about them
                why = refusal.why if isinstance(refusal, TooFewBytes) else refusal.sentence.marked
                self._work.events.note(Sentence(f"left out is {name}: {why}"))
        return found

    def _budgets(self) -> list[float]:
        """Shares, and the bytes that a device has room for."""
        dense = sum(info.nbytes for step in self._plan(self._matrices).steps for info in step.outputs)
        room = [] if self._room is None or self._room.weights >= dense else [self._room.weights]
        return [*SHARES, *room]

    def _plan(self, targets: Sequence[Target], request: Conversion | None = None) -> Plan:
        return plan_for(self._work.source, request or self._work.request, targets, self._store.files(targets))

    def _dense(self, name: str) -> Way:
        return self._way(name, DENSE, self._work.request, self._matrices, 0.0)

    def _alike(self, bits: int, name: str) -> Way:
        chosen = [alike(choices, bits) for choices in self._prices.dense]
        targets = [as_chosen(target, choice) for target, choice in zip(self._matrices, chosen, strict=True)]
        loss = sum(worth * choice.loss for worth, choice in zip(self._prices.worths, chosen, strict=True))
        return self._way(name, EVEN, self._work.request, targets, loss)

    def _ranked(self, keep: float, name: str) -> Way:
        request = Conversion.of(**self._keywords, keep=keep, layout=_PIVOTED).settled()
        plan = make_plan(self._work.source, request)
        targets = spend(plan, request.size, self._store)
        worths = dict(zip((target.module for target in targets), self._prices.worths, strict=True))
        loss = sum(
            worths[target.module] * float(self._store.spectrum(target)[target.rank :].sum()) / 2
            for target in targets
            if target.rank is not None
        )
        return self._way(name, RANK, request, targets, loss)

    def _in_bytes(self, budget: float, name: str) -> Way:
        request = Conversion.of(**self._keywords, bytes=budget).settled()
        fitting = self._fitting
        asked_for = request if fitting is None or fitting.size.bytes != budget else fitting
        chosen = self._prices.offers(bytes_budget(self._work.source, asked_for, self._matrices)).choose()
        targets, loss = [one.target for one in chosen], sum(one.loss for one in chosen)
        return self._way(name, BYTES, request, targets, loss, [one.worth for one in chosen])

    def _way(
        self,
        name: str,
        kind: str,
        request: Conversion,
        targets: Sequence[Target],
        predicted: float,
        worths: Sequence[float] | None = None,
    ) -> Way:
        plan = self._plan(targets, request)
        costs = costs_of(self._work.source, self._row, plan)
        room, bench = self._room, self._bench
        own = [next((grid.bits for grid in target.grids if grid is not None), 16) for target in targets]
        measured = None
        if bench is not None and kind != DENSE:
            self._work.events.note(f"measuring {name}")
            modules = (target.module for target in targets)
            measured = bench.measure(request, plan, dict(zip(modules, worths or self._prices.worths, strict=True)))
        return Way(
            name=name,
            kind=kind,
            options=_words(request) if kind in (RANK, BYTES) else "",
            command=self._command(request) if kind in (RANK, BYTES) else "",
            bytes=plan.bytes_after,
            params=plan.params_after,
            products=sum(target.rank is not None for target in targets),
            bits={bits: own.count(bits) for bits in sorted(set(own), reverse=True)},
            predicted=predicted,
            **asdict(costs),
            fits=None if room is None else plan.bytes_after <= room.weights,
            added=None if measured is None else measured["added"],
            kl=None if measured is None else measured["kl"],
        )
