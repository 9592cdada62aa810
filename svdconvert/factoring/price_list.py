"""What every way to store a matrix costs: its bytes, and the loss that it adds.

With both metrics of the loss, an error E of a weight is estimated to add tr(L E R E^T) / 2 nats per token, whether E
comes of rounding or of truncation, so that both are compared in one currency. Every choice of a list was really made:
rounded with feedback, or truncated and then rounded.

What cannot win is not made. At a budget a byte has a price, the loss that the next one would save elsewhere. A product
loses at least what it cuts off; where that and its bytes at that price are more than the loss and the bytes of a choice
that is known already, no budget so large would take it. So at many bytes only dense choices are made, and products
where bytes are scarce.

A matrix's list is kept in a file of its own, which grows as prices rise; so an interrupted run goes on, and another
budget is a small job.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from svdconvert.errors import InputError
from svdconvert.factoring.decomposer import announcement
from svdconvert.factoring.decompositions import Decompositions
from svdconvert.factoring.rounding import MeteredMatrix
from svdconvert.fields import COUNT, NUMBER, Kind, many, optional, record, require
from svdconvert.grids import Grid
from svdconvert.linalg.panels import Workspace
from svdconvert.machine.lanes import Lanes, lanes_of
from svdconvert.machine.processes import current
from svdconvert.machine.threads import in_threads, usual_workers
from svdconvert.planning.bits import GROUPS, dense_ways, product_ways, ranks_to_try, stored_bytes
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
        device: what computes.
        events: receiver of progress.
    """

    source: Source
    tensors: Mapping[str, TensorInfo]
    store: Decompositions
    key: Mapping[str, Any]
    folder: Path
    widths: Sequence[int]
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
        missing = {target.module: dense_ways(target, self.widths) for target in targets if target.module not in known}
        return self._with(targets, codes, missing, workers)

    def at(
        self,
        targets: Sequence[Target],
        codes: Sequence[str],
        lists: Sequence[Sequence[Choice]],
        price: float,
        workers: int | None = None,
    ) -> list[list[Choice]] | None:
        """The lists with the products that might win at a price; None where no more might.

        Args:
            targets, codes, workers: see :meth:`dense`.
            lists: as they are known.
            price: loss per byte; infinite where bytes are so scarce that the dense choices do not fit.

        Raises:
            InputError, JobError: see :meth:`dense`.
        """
        missing = {}
        for target, code, choices in zip(targets, codes, lists, strict=True):
            spectrum = self.store.spectrum(target)
            tails = spectrum.flip(0).cumsum(0).flip(0).tolist() if bool(spectrum.any()) else []
            more = [way for way in product_ways(target, self.widths) if _might_win(way, code, tails, choices, price)]
            if more and tails:  # of a matrix that the text says nothing of, none
                missing[target.module] = more
        return self._with(targets, codes, missing, workers) if missing else None

    def _with(
        self,
        targets: Sequence[Target],
        codes: Sequence[str],
        missing: Mapping[str, Sequence[Target]],
        workers: int | None,
    ) -> list[list[Choice]]:
        """The lists, after what is missing in them was made."""
        group, lanes = current(), lanes_of(self.device)
        todo = [(t, code) for t, code in zip(targets, codes, strict=True) if t.module in missing]
        mine = split(todo, group.size, lambda one: len(missing[one[0].module]) * matrix_cost(one[0].shape))[group.rank]
        self.events.begin([announcement(self.tensors, target) for target, _ in mine], len(targets) - len(todo))
        if mine:
            needs = partial(rounding_bytes, [target.shape for target, _ in mine])
            workers = min(workers or usual_workers(str(self.device), needs, needs), len(mine))
            # the dearest first, so that no one waits for it alone at the end
            mine.sort(key=lambda one: -len(missing[one[0].module]) * matrix_cost(one[0].shape))
            jobs = (partial(_Pricer.price, target=t, code=code, ways=missing[t.module]) for t, code in mine)
            with ExitStack() as stack:
                in_threads(jobs, [stack.enter_context(closing(_Pricer(self, lanes))) for _ in range(workers)])
        group.wait()
        return [self.read(target, code) for target, code in zip(targets, codes, strict=True)]

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
        ways = [list(self.widths), [[bits, *GROUPS[bits]] for bits in sorted(GROUPS)], ranks_to_try(target)]
        whole = [self.key, ways, code, target.layout.name, versions()["svdconvert"], torch.__version__]
        name = hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=8).hexdigest()
        return self.folder / name / f"{target.module}.json"


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

    def price(self, target: Target, code: str, ways: Sequence[Target]) -> None:
        """Make and keep more of a target's list.

        Args:
            target: what it is of.
            code: type of weights and scales.
            ways: to store it.

        Raises:
            InputError: its weights do not fit the type; the tensor is named.
        """
        lists, step = self._lists, announcement(self._lists.tensors, target)
        lists.events.solving(step)
        info = lists.tensors[target.weight]
        with self._lane:
            with self._reading:
                weight = self._reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).to(lists.device)
            try:
                matrix = MeteredMatrix(weight, lists.store.path(target), torch_dtype(code), self._workspace)
                choices = [*lists.read(target, code), *_priced(matrix, ways, lists.widths, code)]
            except InputError as error:
                raise InputError(f"tensor {target.weight} cannot be converted: {error.sentence.marked}") from None
        lists.source.refuse_changed()
        lists.write(target, code, choices)
        lists.events.decomposed(step)


def _priced(matrix: MeteredMatrix, ways: Sequence[Target], widths: Sequence[int], code: str) -> Iterator[Choice]:
    """Ways to store a matrix with what they cost."""
    if not matrix.is_seen:  # the text says nothing of it, so nothing speaks for few bits
        ways = dense_ways(ways[0], widths)[:2]
    for way in ways:
        loss = 0.0
        if way.rounded:
            loss = max(matrix.rounded(way.rank, way.grids).loss, 0.0) / 2
        elif way.rank is not None:
            loss = matrix.tail(way.rank) / 2
        yield Choice(way.rank, way.grids, stored_bytes(way, code), loss)


def _might_win(way: Target, code: str, tails: Sequence[float], choices: Sequence[Choice], price: float) -> bool:
    """Whether a product that is not among the choices might be better than all of them.

    Args:
        way: the product.
        code: type of weights and scales.
        tails: element r is what rank r cuts off.
        choices: that are known.
        price: of a byte.
    """
    assert way.rank is not None
    least, nbytes = tails[way.rank] / 2 if way.rank < len(tails) else 0.0, stored_bytes(way, code)
    if any(choice.rank == way.rank and choice.grids == way.grids for choice in choices):
        return False
    if least >= mixture_loss(choices, nbytes):
        return False
    return math.isinf(price) or least + price * nbytes < min(choice.loss + price * choice.nbytes for choice in choices)
