"""From a request to its plan, using config and headers alone.

Nothing here reads tensor data or imports torch, so a plan takes seconds whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.fused import split_tensors
from svdconvert.families.table import Architecture, dense_architecture
from svdconvert.layouts.table import layout_named
from svdconvert.planning.bits import WHOLE, at_one_width, beside_targets, evenly, least_bytes, types_of
from svdconvert.planning.checks import check_packable, check_tensors
from svdconvert.planning.conversion_steps import conversion_steps
from svdconvert.planning.fit import enough, fit_notes, fits_already, room_of
from svdconvert.planning.healing_needs import healing_needs
from svdconvert.planning.memory import training_bytes
from svdconvert.planning.notes import plan_notes, solver_note, unused_note
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import Target, assign
from svdconvert.planning.size_search import LARGEST
from svdconvert.planning.steps import Step, files_bytes, in_order, shard, with_copies
from svdconvert.planning.targets import choose_targets, in_parts, share, share_experts
from svdconvert.planning.text_memory import text_passes
from svdconvert.planning.whole import bytes_of, whole_steps
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.solvers.table import SOLVERS
from svdconvert.storage.source import Source
from svdconvert.storage.tying import head_copies
from svdconvert.tensors import TensorInfo, parameters
from svdconvert.words import size as size_text


@dataclass(frozen=True)
class _Parameters:
    """The tensors of a source.

    Attributes:
        row: their architecture.
        kept: tensors that the result has as well.
        rest: parameters beside the language model.
        dropped: names of tensors that no current model reads.
        copies: copies of the embedding, which is stored once.
    """

    row: Architecture
    kept: Mapping[str, TensorInfo]
    rest: int
    dropped: Sequence[str]
    copies: Sequence[TensorInfo]

    @classmethod
    def of(cls, source: Source) -> _Parameters:
        """Sort the tensors of a source."""
        row = dense_architecture(source.config, source.where)
        dropped = [name for name in source.tensors if row.is_dropped(name)]
        copies = head_copies(row, source)
        left_out = {*dropped, *(copy.name for copy in copies)}
        kept = {name: info for name, info in source.tensors.items() if name not in left_out}
        rest = 0 if source.whole is None else source.whole.size
        return cls(row, kept, rest, dropped, copies)

    @property
    def count(self) -> int:
        """Parameters of the whole model."""
        return self.rest + sum(info.size for info in self.kept.values())

    def beside(self, targets: Iterable[Target]) -> int:
        """Parameters outside the target weights."""
        return self.count - sum(target.dense_params for target in targets)


def make_plan(source: Source, request: Conversion) -> Plan:
    """Plan a conversion; a budget is spread evenly, and one that has to be found begins as large as it can be.

    Args:
        source: the dense model.
        request: what is asked for, see :meth:`Conversion.check_planned`; fitted, see :mod:`svdconvert.planning.fit`.

    Raises:
        InputError: the source is not supported, lacks tensors, or cannot meet the request.
    """
    model = _Parameters.of(source)
    targets, cut = _matrices(source, request, model)
    if request.size.bytes is not None:
        return _in_bytes(source, request, targets, cut)
    if request.size.fit is not None and request.size.params is not None and request.size.params >= model.count:
        raise fits_already(room_of(source, request), training_bytes(model.count))
    size = request.size if request.size.limit is None else request.size.at(LARGEST)
    return plan_for(source, request, at_one_width(assign(targets, size, model.beside(targets)), size))


def plan_of_matrices(source: Source, request: Conversion) -> Plan:
    """The plan of a conversion whose matrices all stay as they are, whatever size is asked for.

    Args:
        source, request: see :func:`make_plan`.

    Raises:
        InputError: the source is not supported, or lacks tensors.
    """
    targets, _ = _matrices(source, request, _Parameters.of(source))
    return plan_for(source, request, [replace(target, reason=WHOLE) for target in targets])


def _matrices(source: Source, request: Conversion, model: _Parameters) -> tuple[list[Target], Mapping[str, TensorInfo]]:
    """What is to be stored in less, and the tensors as it names them."""
    check_tensors(model.kept, model.row, source)
    layout, scope = layout_named(request.recipe.layout), request.scope
    cut, row = in_parts(model.kept, model.row, source) if scope.split_fused else (model.kept, model.row)
    targets = [replace(target, layout=layout) for target in choose_targets(cut, row, scope.targets)]
    targets = share_experts(targets, cut, row) if scope.share_experts else share(targets, scope.share_layers, cut)
    check_packable(source, row, request)
    return targets, cut


def _parameters_after(steps: Iterable[Step], targets: Iterable[Target]) -> int:
    """Parameters of the result: those of weights of few bits are their entries, not their words and scales."""
    rounded = {target.weight: target.params for target in targets if target.rounded}
    return sum(rounded[step.key] if step.key in rounded else parameters(step.outputs) for step in steps)


def _in_bytes(
    source: Source,
    request: Conversion,
    targets: Sequence[Target],
    tensors: Mapping[str, TensorInfo],
) -> Plan:
    """What can be said of a budget of bytes from headers: the same width for all matrices.

    Args:
        source, request: see :func:`make_plan`.
        targets: the matrices.
        tensors: of the model.
    """
    asked_for = asked(*request.size.given)
    budget = bytes_budget(source, request, targets)
    plan = plan_for(source, request, evenly(targets, request.size, types_of(targets, tensors, request), budget))
    if not plan.grids and not plan.ranks:
        if request.size.fit is not None:
            raise fits_already(room_of(source, request), plan.bytes_after)
        raise InputError(
            f"{asked_for} keeps every matrix as it is, since all weight files together take "
            f"{size_text(plan.bytes_after)}; give less, or a share of the targets' bytes such as 0.5"
        )
    note = "all matrices are shown alike; which gets how many bits, and which a rank, is chosen by what the text says"
    return replace(plan, notes=(*plan.notes, note))


def bytes_budget(source: Source, request: Conversion, targets: Sequence[Target]) -> int:
    """Bytes that the target weights may take together.

    Args:
        source: the dense model. What the result leaves out of it, legacy buffers and copies of the embedding, takes
            nothing.
        request: with a size in bytes.
        targets: single matrices, whole tensors of it.

    Raises:
        InputError: there is nothing left for them.
    """
    params = sum(target.dense_params for target in targets)
    tensors = _Parameters.of(source).kept
    others = beside_targets(targets, tensors, request, source.whole)
    budget = request.size.target_bytes(params, others)
    assert budget is not None
    if budget <= 0:
        given = asked(*request.size.given)
        if request.size.fit is not None:
            room = room_of(source, request)
            least = others + least_bytes(targets, request.size, types_of(targets, tensors, request))
            raise InputError(
                f"{given} cannot be met, since everything but the targets takes {size_text(others)}: {room}; give more "
                f"memory, {enough(request.size.fit, least - room.weights)} at least"
            )
        raise InputError(
            f"{given} cannot be met, since everything but the targets takes {others:,} bytes already; give more, or a "
            "share of the targets' bytes such as 0.5"
        )
    return budget


def plan_for(
    source: Source,
    request: Conversion,
    targets: Sequence[Target],
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> Plan:
    """The plan of given ranks.

    Args:
        source: the dense model.
        request: what is asked for.
        targets: the matrices, with a rank or a reason to stay dense.
        files: module path -> further options of its step: the files of a decomposition that was computed beforehand,
            or of refitted factors.
    """
    model = _Parameters.of(source)
    row = model.row
    # A projection of which every part stays dense stays whole.
    split = {part.fused for target in targets if target.rank is not None for part in target.parts}
    cut = split_tensors(model.kept, row, source.config, split.__contains__)
    steps = conversion_steps(cut, targets, row, source.config, request, files or {})
    if model.copies:
        steps = in_order(with_copies(step, model.copies, row) for step in steps)
    steps = whole_steps(source, steps)
    outputs = [info for step in steps for info in step.outputs]
    shards = shard(outputs, request.output.max_shard_bytes)
    budget = request.size.budget(sum(target.dense_params for target in targets), model.beside(targets))
    notes: list[str | None] = [*plan_notes(source, model.row, model.dropped, model.copies, targets, request, budget)]
    if request.size.bytes is not None:
        weights = {target.weight for target in targets}
        stored = sum(info.nbytes for step in steps if step.key in weights for info in step.outputs)
        notes.append(unused_note(targets, request, stored, bytes_budget(source, request, targets)))
    notes.append(solver_note(steps, SOLVERS[request.recipe.solver]))
    return Plan(
        source=source.name,
        commit=source.commit,
        architecture=row.model_type,
        method=request.method.name,
        targets=tuple(targets),
        steps=tuple(steps),
        shards=shards,
        params_before=model.count,
        params_after=_parameters_after(steps, targets),
        bytes_before=bytes_of(source),
        bytes_after=files_bytes(shards),
        notes=(*fit_notes(source, request), *(note for note in notes if note is not None)),
        settings=request.planned(),
        opening_bytes=source.opening_bytes,
        passes=text_passes(source, row, targets, request),
        checked=request.output.check,
        healing=healing_needs(source, row, targets, steps, shards, request),
    )
