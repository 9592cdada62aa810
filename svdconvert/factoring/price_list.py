"""What every way to store a matrix costs: its bytes, and the loss that it adds.

With both metrics of the loss, an error E of a weight is estimated to add tr(L E R E^T) / 2 nats per token, whether E
comes of rounding or of truncation, so that both are compared in one currency. Every choice of a list was really made:
rounded with feedback, or truncated and then rounded. What is written is improved by coordinate descent, and so loses
some 5 to 10 % less.

What cannot be expected to win is not made. At a budget a byte has a price, the loss that the next one would save
elsewhere. A product loses what it cuts off, and some of what dense rounding of as many bits does; where that and its
bytes at that price are more than the loss and the bytes of a choice that is known already, no budget so large would
take it. So at many bytes only dense choices are made, and products where bytes are scarce.

What was priced of a matrix is kept in a file of its own, so that an interrupted run goes on, and another budget is a
small job. What another budget has priced is looked up there and does not widen the choice: the result depends on its
own budget alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from svdconvert.errors import InputError
from svdconvert.factoring.decompositions import Decompositions
from svdconvert.factoring.rounding import MeteredMatrix
from svdconvert.fields import COUNT, NUMBER, Kind, many, optional, record, require
from svdconvert.grids import Grid
from svdconvert.linalg.feedback import PROCEDURE
from svdconvert.linalg.panels import Workspace
from svdconvert.machine.lanes import Lanes, lanes_of
from svdconvert.machine.processes import current
from svdconvert.machine.threads import in_threads, usual_workers
from svdconvert.planning.bits import GROUPS, OWN, dense_ways, product_ways, ranks_to_try, stored_bytes
from svdconvert.planning.choices import Choice, mixture_loss
from svdconvert.planning.events import Events
from svdconvert.planning.memory import rounding_bytes
from svdconvert.planning.partition import matrix_cost, split
from svdconvert.planning.ranks import Target
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import read_json
from svdconvert.storage.reader import WeightReader, torch_dtype
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_files import sealed, unseal
from svdconvert.tensors import TensorInfo
from svdconvert.version import versions

# The least that rounding a product was seen to lose, as a share of what the matrix itself loses at as many bits: 0.4 to
# 2 of it in SmolLM2-135M.
LEAST_ROUNDING = 0.4

# What to do about a damaged file.
_AGAIN = "delete it, then the same command computes it again"
_GRID: Kind = optional(many(COUNT))
_FIELDS = {"choices": many(record({"rank": optional(COUNT), "grids": many(_GRID), "bytes": COUNT, "loss": NUMBER}))}


@dataclass(frozen=True)
class PriceLists:
    """The lists of a model's matrices.

    Attributes:
        source: the dense model.
        tensors: of it, as the targets name them.
        store: decompositions of all targets, with both metrics whole.
        key: what those depend on, in JSON types.
        folder: keeps the lists.
        widths: that a weight may have, see :class:`svdconvert.settings.size.Size`.
        multiple: that every rank is one of.
        device: what computes.
        events: receiver of progress.
    """

    source: Source
    tensors: Mapping[str, TensorInfo]
    store: Decompositions
    key: Mapping[str, Any]
    folder: Path
    widths: Sequence[int]
    multiple: int
    device: torch.device
    events: Events

    def dense(self, targets: Sequence[Target], codes: Sequence[str], workers: int | None = None) -> list[list[Choice]]:
        """A list for each target, with all its dense choices at least; of several processes by all.

        Args:
            targets: single matrices.
            codes: of each, the type of weights and scales.
            workers: matrices in work at the same time; None: one a core on the CPU, as far as memory goes.

        Raises:
            InputError: a matrix does not fit the type, or the file of an earlier run is damaged.
            JobError: a file cannot be written.
        """
        here = {t.module for t, code in zip(targets, codes, strict=True) if self._path(t, code).is_file()}
        known = current().share(here)
        every = {target.module: _Missing(dense_ways(target, self.widths)) for target in targets}
        missing = {module: ways for module, ways in every.items() if module not in known}
        self._make(targets, codes, missing, workers)
        found = [self.read(target, code) for target, code in zip(targets, codes, strict=True)]
        current().wait()  # or a process that goes on would write more into what another one is still to read
        return [[choice for choice in choices if choice.rank is None] for choices in found]

    def at(
        self,
        targets: Sequence[Target],
        codes: Sequence[str],
        lists: Sequence[Sequence[Choice]],
        prices: Sequence[float],
        workers: int | None = None,
    ) -> list[list[Choice]] | None:
        """The lists with the products that might win at some prices; None where no more might.

        Args:
            targets, codes, workers: see :meth:`dense`.
            lists: as they are known.
            prices: of each, its loss per byte; infinite where bytes are so scarce that the dense choices do not fit.

        Raises:
            InputError, JobError: see :meth:`dense`.
        """
        missing = {}
        for target, code, choices, price in zip(targets, codes, lists, prices, strict=True):
            spectrum = self.store.spectrum(target)
            tails = spectrum.flip(0).cumsum(0).flip(0).tolist() if bool(spectrum.any()) else []
            bar = _Bar(code, lambda rank, tails=tails: tails[rank] if rank < len(tails) else 0.0, price)  # type: ignore[misc]
            more = [way for way in product_ways(target, self.widths, self.multiple) if bar.is_passed(way, choices)]
            if more and tails:  # of a matrix that the text says nothing of, none
                missing[target.module] = _Missing(more, choices, bar)
        if not missing:
            return None
        todo = {
            t.module
            for t, code in zip(targets, codes, strict=True)
            if t.module in missing and self._looked_up(t, code, missing) is None
        }
        todo = current().share(todo)
        self._make(targets, codes, {module: missing[module] for module in todo}, workers)
        found = [self._looked_up(target, code, missing) for target, code in zip(targets, codes, strict=True)]
        current().wait()  # see dense
        return [
            list(choices) if more is None else more  # nothing is missing in those that cannot be looked up
            for choices, more in zip(lists, found, strict=True)
        ]

    def _make(
        self,
        targets: Sequence[Target],
        codes: Sequence[str],
        missing: Mapping[str, _Missing],
        workers: int | None,
    ) -> None:
        """Price what is missing, and wait until all processes have."""
        group, lanes = current(), lanes_of(self.device)
        todo = [(t, code) for t, code in zip(targets, codes, strict=True) if t.module in missing]

        def cost(one: tuple[Target, str]) -> float:
            return len(missing[one[0].module].ways) * matrix_cost(one[0].shape)

        mine = split(todo, group.size, cost)[group.rank]
        if mine:
            done = _Count(self.events, len(mine))
            needs = partial(rounding_bytes, [target.shape for target, _ in mine])
            workers = min(workers or usual_workers(str(self.device), needs, needs), len(mine))
            # the dearest first, so that no one waits for it alone at the end
            mine.sort(key=cost, reverse=True)
            jobs = (
                partial(_Pricer.price, target=t, code=code, missing=missing[t.module], done=done) for t, code in mine
            )
            with ExitStack() as stack:
                in_threads(jobs, [stack.enter_context(closing(_Pricer(self, lanes))) for _ in range(workers)])
        group.wait()

    def _looked_up(self, target: Target, code: str, missing: Mapping[str, _Missing]) -> list[Choice] | None:
        """A list with what was missing in it, by the file alone; None where that does not have it all."""
        if target.module not in missing:
            return None
        kept = {(choice.rank, choice.grids): choice for choice in self.read(target, code)}
        try:
            return missing[target.module].made(lambda way: kept[way.rank, way.grids])
        except KeyError:
            return None

    def write(self, target: Target, code: str, choices: Sequence[Choice]) -> None:
        """Keep a list."""
        told = [
            {
                "rank": choice.rank,
                "grids": [None if grid is None else [grid.bits, grid.group] for grid in choice.grids],
                "bytes": choice.nbytes,
                "loss": choice.loss,
            }
            for choice in choices
        ]
        path = self._path(target, code)
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, sealed({"choices": told}))

    def read(self, target: Target, code: str) -> list[Choice]:
        """A list, as far as it is known; empty where nothing is."""
        path = self._path(target, code)
        if not path.is_file():
            return []
        document = unseal(read_json(path, "", _AGAIN), path, _AGAIN)
        require(document, _FIELDS, path, _AGAIN)
        return [
            Choice(
                one["rank"],
                tuple(None if grid is None else Grid(*grid) for grid in one["grids"]),
                one["bytes"],
                one["loss"],
            )
            for one in document["choices"]
        ]

    def _path(self, target: Target, code: str) -> Path:
        ranks = ranks_to_try(target, self.multiple)
        ways = [list(self.widths), [[bits, *GROUPS[bits]] for bits in sorted(GROUPS)], ranks]
        whole = [self.key, PROCEDURE, ways, code, target.layout.name, versions()["svdconvert"], torch.__version__]
        name = hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=8).hexdigest()
        return self.folder / name / f"{target.module}.json"


@dataclass(frozen=True)
class _Missing:
    """What is missing in a list.

    Attributes:
        ways: to store the matrix, dense ones or products.
        known: the choices that there are.
        bar: that a way has to pass; None for dense ones.
    """

    ways: Sequence[Target]
    known: Sequence[Choice] = ()
    bar: _Bar | None = None

    def made(self, price: Callable[[Target], Choice]) -> list[Choice]:
        """The known choices, and those of the ways that still might win when their turn comes.

        Args:
            price: makes a choice of a way.
        """
        ways, bar, choices = self.ways, self.bar, list(self.known)
        if bar is not None:  # those that promise most first, since what they reach spares others
            ways = sorted(ways, key=lambda way: bar.best(way, self.known))
        for way in ways:
            if bar is None or bar.is_passed(way, choices):
                choices.append(price(way))
        return choices


class _Count:
    """Progress in matrices, told by several threads."""

    def __init__(self, events: Events, total: int) -> None:
        self._events, self._total, self._done, self._lock = events, total, 0, threading.Lock()
        events.progress("rounding", 0, total)

    def one_more(self) -> None:
        """Another matrix is done."""
        with self._lock:
            self._done += 1
            self._events.progress("rounding", self._done, self._total)


class _Pricer:
    """Makes lists in one thread, with buffers and an open file of its own."""

    # Held by whoever reads from the source, so that no two threads fetch the same file.
    _reading = threading.Lock()

    def __init__(self, lists: PriceLists, lanes: Lanes) -> None:
        self._lists, self._lane = lists, lanes.worker()
        self._reader, self._workspace = WeightReader(lists.source), Workspace()

    def close(self) -> None:
        """Close the open file."""
        self._reader.close()

    def price(self, target: Target, code: str, missing: _Missing, done: _Count) -> None:
        """Make and keep more of a target's list.

        Args:
            target: what it is of.
            code: type of weights and scales.
            missing: ways to store it.
            done: is told when it is.

        Raises:
            InputError: its weights do not fit the type; the tensor is named.
        """
        lists = self._lists
        info = lists.tensors[target.weight]
        with self._lane:
            with self._reading:
                weight = self._reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).to(lists.device)
            try:
                matrix = MeteredMatrix(weight, lists.store.path(target), torch_dtype(code), self._workspace)
                choices = _priced(matrix, missing, lists.read(target, code), code)
            except InputError as error:
                raise InputError(f"tensor {target.weight} cannot be converted: {error.sentence.marked}") from None
        lists.source.refuse_changed()
        lists.write(target, code, choices)
        done.one_more()


@dataclass(frozen=True)
class _Bar:
    """What a product has to pass, so that it is worth making.

    Attributes:
        code: type of weights and scales.
        tail: rank -> what it cuts off.
        price: of a byte.
    """

    code: str
    tail: Callable[[int], float]
    price: float

    def least(self, way: Target, choices: Sequence[Choice]) -> float:
        """The least loss that a product can be expected to have, by the dense choices of its width."""
        assert way.rank is not None
        bits = next((grid.bits for grid in way.grids if grid is not None), OWN)
        dense = [one.loss for one in choices if one.rank is None and [g.bits for g in one.grids if g] == [bits]]
        return self.tail(way.rank) / 2 + LEAST_ROUNDING * min(dense, default=0.0)

    def best(self, way: Target, choices: Sequence[Choice]) -> float:
        """Its least loss and its bytes at their price; of bytes without a price, the loss alone."""
        return self.least(way, choices) + (0 if math.isinf(self.price) else self.price * stored_bytes(way, self.code))

    def is_passed(self, way: Target, choices: Sequence[Choice]) -> bool:
        """Whether a product that is not among the choices might be better than all of them."""
        if any(choice.rank == way.rank and choice.grids == way.grids for choice in choices):
            return False
        if self.least(way, choices) >= mixture_loss(choices, stored_bytes(way, self.code)):
            return False
        known = min(choice.loss + self.price * choice.nbytes for choice in choices)
        return math.isinf(self.price) or self.best(way, choices) < known


def _priced(matrix: MeteredMatrix, missing: _Missing, kept: Sequence[Choice], code: str) -> list[Choice]:
    """What was priced of a matrix so far, and now."""
    every = {(choice.rank, choice.grids): choice for choice in kept}
    if not matrix.is_seen and missing.bar is None:  # the text says nothing of it, so nothing speaks for few bits
        missing = replace(missing, ways=missing.ways[:2])

    def price(way: Target) -> Choice:
        if (way.rank, way.grids) not in every:
            loss = 0.0
            if way.rounded:
                loss = max(matrix.rounded(way.rank, way.grids).loss, 0.0) / 2
            elif way.rank is not None:
                loss = matrix.tail(way.rank) / 2
            every[way.rank, way.grids] = Choice(way.rank, way.grids, stored_bytes(way, code), loss)
        return every[way.rank, way.grids]

    missing.made(price)
    return list(every.values())
