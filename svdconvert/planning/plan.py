"""What a conversion would do, from config and headers alone: counts, sizes, needs, and the job itself.

Nothing here reads tensor data or imports torch, so a plan takes seconds whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.fused import split_tensors
from svdconvert.families.table import Architecture, dense_architecture, dense_shapes
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import DEFAULT, layout_named
from svdconvert.methods.table import method_named
from svdconvert.names import layer_number, natural, suffix
from svdconvert.planning.ranks import RankRequest, Target, assign
from svdconvert.planning.steps import Step, files_bytes, in_order, shard, with_copies
from svdconvert.planning.targets import choose_targets, in_parts, share
from svdconvert.sentences import asked
from svdconvert.solvers import table as fast
from svdconvert.storage.other_models import quantised_part, refuse_other_model
from svdconvert.storage.source import Source
from svdconvert.storage.tying import head_copies
from svdconvert.tensors import CODES, DTYPES, FLOATS, TensorInfo, parameters
from svdconvert.words import listing

# fp32 weight, gradient and the two moments of AdamW; activations come on top of it.
TRAINING_BYTES_PER_PARAMETER = 16

# A Python process with torch loaded and buffers for copying, measured (docs/measurements.md).
BASE_BYTES = 400_000_000


@dataclass(frozen=True)
class Group:
    """Targets of one kind, as one line of the plan: same suffix and shape.

    Attributes:
        name: suffix of the module paths.
        shape: ``(out, in)`` of each.
        count: number of matrices.
        ranks: lowest and highest rank among those that are factored, or None where none is.
        dense: how many stay dense.
        break_even: the rank from which on nothing is saved; where layers share, in the largest group.
        dense_params, params: parameters of all of them, before and after.
        shared: layers that share one input-side factor.
    """

    name: str
    shape: tuple[int, int]
    count: int
    ranks: tuple[int, int] | None
    dense: int
    break_even: float
    dense_params: int
    params: int
    shared: int = 1

    @property
    def rank(self) -> str:
        """The ranks in words: ``48``, ``42-49``, ``dense``, ``42-49, 1 dense``."""
        if self.ranks is None:
            return "dense"
        lowest, highest = self.ranks
        return (str(lowest) if lowest == highest else f"{lowest}-{highest}") + (
            f", {self.dense} dense" if self.dense else ""
        )


@dataclass(frozen=True)
class Plan:
    """What a conversion does.

    Attributes:
        source: name of the model.
        commit: its commit on the Hub, or None.
        architecture: model_type of the source.
        method: row of :data:`svdconvert.methods.table.METHODS`.
        targets: every matrix that may be factored, with its rank or the reason why it stays dense.
        steps: the job, in the order in which the source's files are read.
        shards: weight files to write and what is in them.
        params_before, params_after: parameters of the whole model.
        bytes_before, bytes_after: bytes of the weight files.
        notes: what the user should know: dropped buffers, matrices that stay dense.
        settings: what the result depends on; a job continues only under the same.
    """

    source: str
    commit: str | None
    architecture: str
    method: str
    targets: tuple[Target, ...]
    steps: tuple[Step, ...]
    shards: Mapping[str, Sequence[TensorInfo]]
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank, as config.json's ``svd_ranks``."""
        return {part.module: t.rank for t in self.targets if t.rank is not None for part in t.parts}

    @property
    def shared(self) -> dict[str, str]:
        """Module path -> that of the layer whose input-side factor it uses, as config.json's ``svd_shared``."""
        return {part.module: t.module for t in self.targets if t.rank is not None for part in t.followers}

    @cached_property
    def groups(self) -> list[Group]:
        """The targets, summed up by kind."""

        kinds: dict[tuple[str, tuple[int, int]], list[Target]] = {}
        for target in self.targets:
            kinds.setdefault((suffix(target.module), (target.parts[0].rows, target.shape[1])), []).append(target)
        groups = []
        for (name, shape), same in kinds.items():
            ranks = [t.rank for t in same if t.rank is not None]
            groups.append(
                Group(
                    name=name,
                    shape=shape,
                    count=sum(len(t.parts) for t in same),
                    ranks=(min(ranks), max(ranks)) if ranks else None,
                    dense=sum(len(t.parts) for t in same if t.rank is None),
                    break_even=max(t.break_even for t in same),
                    dense_params=sum(t.dense_params for t in same),
                    params=sum(t.params for t in same),
                    shared=max(len(t.parts) for t in same),
                )
            )
        return groups

    @property
    def training_bytes(self) -> tuple[int, int]:
        """Memory of weights, gradients and optimiser for full fine-tuning, before and after; no activations."""
        return (
            self.params_before * TRAINING_BYTES_PER_PARAMETER,
            self.params_after * TRAINING_BYTES_PER_PARAMETER,
        )

    def peak_bytes(self, workers: int = 1) -> int:
        """Estimated peak of host memory when solving on the CPU.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        work = 0
        for target, raw, stored in self._solved():
            k = min(target.shape)
            # The next matrix is read ahead, and up to two results wait to be written.
            waiting = raw + 2 * stored
            # Three k x k arrays in float32, the Gram matrix and LAPACK's workspace, and the smaller factor with its
            # inverse. The matrices of a group are stacked in a copy.
            own = (2 if target.followers else 1) * raw + stored
            own += 3 * 4 * k * k + 4 * 4 * k * (target.rank or 0)
            work = max(work, waiting + workers * own)
        return BASE_BYTES + work

    def device_bytes(self, workers: int = 1) -> int:
        """Estimated peak of a GPU's memory when solving on one.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        work = 0
        for target, raw, stored in self._solved():
            k = min(target.shape)
            # Each worker has one matrix in work and begun with another; one more is on its way. Gram matrix,
            # eigenvectors and the eigensolver's workspace are in float64 where float32 is not enough.
            work = max(work, raw + workers * (3 * raw + 2 * stored + 5 * 8 * k * k))
        return work

    def _solved(self) -> Iterator[tuple[Target, int, int]]:
        """The targets that get a rank, with the bytes that their steps read and write."""
        ranked = {target.weight: target for target in self.targets if target.rank}
        for step in self.steps:
            if step.key in ranked:
                raw, stored = (sum(info.nbytes for info in infos) for infos in (step.inputs, step.outputs))
                yield ranked[step.key], raw, stored

    def to_json(self) -> dict[str, Any]:
        """The plan in JSON types, for ``--json``."""
        before, after = self.training_bytes
        return {
            "source": self.source,
            "commit": self.commit,
            "architecture": self.architecture,
            "method": self.method,
            "params": {"before": self.params_before, "after": self.params_after},
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "groups": [asdict(group) for group in self.groups],
            "svd_ranks": self.ranks,
            "svd_shared": self.shared,
            "shards": {file: sum(info.nbytes for info in infos) for file, infos in self.shards.items()},
            "peak_memory_bytes": self.peak_bytes(),
            "peak_memory_bytes_per_worker": self.peak_bytes(2) - self.peak_bytes(1),
            "training_bytes": {"before": before, "after": after},
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }


def make_plan(
    source: Source,
    request: RankRequest,
    *,
    method: str = "svd",
    targets: Sequence[str] = (),
    dtype: str = "keep",
    max_shard_bytes: int = 5_000_000_000,
    ranked: Sequence[Target] | None = None,
    decompositions: Mapping[str, Mapping[str, Any]] | None = None,
    refitted: Mapping[str, str] | None = None,
    layout: str = DEFAULT.name,
    share_layers: int = 1,
    split_fused: bool = False,
    solver: str = "exact",
) -> Plan:
    """Plan a conversion.

    Args:
        source: the dense model.
        request: ranks, kept fraction or model size.
        method: row of :data:`svdconvert.methods.table.METHODS`.
        targets: patterns that choose among the architecture's linear layers; empty chooses all of them.
        dtype: ``keep`` or the torch name of the type that every tensor of the result gets.
        max_shard_bytes: limit of a weight file.
        ranked: the targets with the ranks that a budget has given them; None for those that the request itself gives.
        layout: row of :data:`svdconvert.layouts.table.LAYOUTS`.
        decompositions: module path -> options of the step that truncates its decomposition, where that was computed
            beforehand.
        refitted: module path -> file with its refitted factors, where there are such.
        share_layers: consecutive layers that share their input-side factor.
        split_fused: whether queries, keys and values that are one matrix are factored as three.
        solver: one of :data:`svdconvert.solvers.table.SOLVERS`.

    Raises:
        InputError: the source is not supported, lacks tensors, or cannot meet the request.
    """
    row = dense_architecture(source.config, source.where)
    method = method_named(method).name
    fast.check_solver(solver, method, share_layers=share_layers)
    if dtype != "keep" and CODES.get(dtype) not in FLOATS - {"F64"}:
        raise InputError(f"{asked('dtype', dtype)} is unknown; choose keep, float16, bfloat16 or float32")
    dropped = [name for name in source.tensors if row.is_dropped(name)]
    copies = head_copies(row, source)
    left_out = {*dropped, *(copy.name for copy in copies)}
    kept = {name: info for name, info in source.tensors.items() if name not in left_out}
    check_tensors(kept, row, source)

    stored = layout_named(layout)
    cut, split_row = in_parts(kept, row, source) if split_fused else (kept, row)
    candidates = [replace(target, layout=stored) for target in choose_targets(cut, split_row, targets)]
    candidates = share(candidates, share_layers, cut)
    dense_params = sum(info.size for info in kept.values())
    untouched = dense_params - sum(target.dense_params for target in candidates)
    if ranked is None:
        ranked = assign(candidates, request, untouched)
    # a projection of which every part stays dense stays whole
    split = {part.fused for target in ranked if target.rank is not None for part in target.parts}
    cut = split_tensors(kept, row, source.config, split.__contains__)
    steps = _steps(cut, ranked, row, source.config, dtype, decompositions or {}, refitted or {}, stored, solver)
    if copies:
        steps = in_order(with_copies(step, copies, row) for step in steps)
    outputs = [info for step in steps for info in step.outputs]
    shards = shard(outputs, max_shard_bytes)
    notes = _notes(source, dropped, copies, ranked, request, untouched, share_layers)
    return Plan(
        source=source.name,
        commit=source.commit,
        architecture=row.model_type,
        method=method,
        targets=tuple(ranked),
        steps=tuple(steps),
        shards=shards,
        params_before=dense_params,
        params_after=parameters(outputs),
        bytes_before=sum(info.nbytes for info in source.tensors.values()),
        bytes_after=files_bytes(shards),
        notes=(*notes, planned(steps)) if solver == "fast" else tuple(notes),
        settings={
            "method": method,
            "targets": list(targets),
            **request.settings(),
            "dtype": dtype,
            "layout": layout,
            "share_layers": share_layers,
            "split_fused": split_fused,
            "solver": solver,
            "max_shard_bytes": max_shard_bytes,
        },
    )


def check_tensors(tensors: Mapping[str, TensorInfo], row: Architecture, source: Source) -> None:
    """Compare the headers with what a model of this config must have.

    Raises:
        InputError: the checkpoint is quantised, or a tensor is missing, has another shape, or is none the architecture
            knows.
    """
    check_layers(tensors, source)
    expected = dense_shapes(row, source.config, source.where)
    full = row.full_names(tensors, source.config)
    found = {full[name]: info for name, info in tensors.items()}
    for name, info in tensors.items():
        by = quantised_part(name)
        if by is not None or (full[name] in expected and info.dtype not in FLOATS):
            raise InputError(
                f"tensor {name} of {source.where} ({DTYPES[info.dtype][1]}) belongs to a quantised checkpoint"
                f"{by or ''}; convert the unquantised model and quantise the result"
            )
    refuse_other_model(tensors, full, expected, row, source)
    missing = [name for name in expected if name not in found]
    if missing:
        raise InputError(f"{source.where} lacks {listing(missing)}; the checkpoint is incomplete, fetch it again")
    if len(found) < len(tensors):
        twice = next(name for name in tensors if row.prefix + name in tensors)
        raise InputError(f"{source.where} has both {twice} and {row.prefix}{twice}; remove one of them")
    for name, info in tensors.items():
        shape = expected.get(full[name])
        if shape is None:
            raise InputError(
                f"{source.where} has the tensor {name} ({info.file}), which {row.dense_class} does not know; "
                "remove it from the checkpoint or correct config.json"
            )
        if info.shape != shape:
            raise InputError(
                f"tensor {name} of {source.where} has shape {list(info.shape)}, but according to config.json it must "
                "be "
                f"{list(shape)}; config and weights are not of one model"
            )


def check_layers(tensors: Mapping[str, TensorInfo], source: Source) -> None:
    """Compare the number of blocks, before anything is made for each of as many as config.json says.

    Raises:
        InputError: there are others.
    """
    said = source.config.get("n_layer") or source.config.get("num_hidden_layers")
    there = 1 + max((layer_number(name) for name in tensors), default=-1)
    if said and there and said != there:
        raise InputError(
            f"config.json of {source.where} says {said} layers, but there are weights of {there}; "
            "the checkpoint is incomplete, or config and weights are not of one model"
        )


def _steps(
    tensors: Mapping[str, TensorInfo],
    targets: Sequence[Target],
    row: Architecture,
    config: Mapping[str, Any],
    dtype: str,
    decompositions: Mapping[str, Mapping[str, Any]],
    refitted: Mapping[str, str],
    layout: Layout,
    solver: str,
) -> list[Step]:
    """One step per source tensor or group, in the order of the source's files, so that each file is needed once.

    A group's step comes where its last tensor is read.
    """
    owners = {part.weight: target for target in targets if target.rank is not None for part in target.parts}
    factored_biases = {weight.removesuffix("weight") + "bias" for weight in owners}
    unread = {target.weight: len(target.parts) for target in owners.values()}
    steps = []
    full = row.full_names(tensors, config)
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start, natural(item[0]))):
        code = info.dtype if dtype == "keep" else CODES[dtype]
        if name in owners:
            target = owners[name]
            unread[target.weight] -= 1
            if not unread[target.weight]:
                options = dict(decompositions.get(target.module, {}))
                if target.module in refitted:
                    options["refitted"] = refitted[target.module]
                if fast.SOLVERS[solver].acts(target.shape, target.rank or 0):
                    options["solver"] = solver
                steps.append(_factor_step(tensors, target, row, code, layout, options))
            continue
        renamed = layout.bias_name(full[name]) if name in factored_biases else row.factored_name(full[name])
        copied = replace(info, name=renamed, dtype=code, file="", start=-1, cut=None)
        steps.append(Step("copy", name, (info,), (copied,)))
    return steps


def _factor_step(
    tensors: Mapping[str, TensorInfo],
    target: Target,
    row: Architecture,
    code: str,
    layout: Layout,
    options: Mapping[str, Any],
) -> Step:
    """Weights of a target -> the tensors of its layout; of a group, the shared one first, then one for each layer."""
    rank = target.rank
    assert rank is not None
    inputs = tuple(tensors[part.weight] for part in target.parts)
    # all but the first tensor of a layout belong to the layer itself
    names = [f"{row.prefix}{part.module}.weight" for part in target.parts]
    shapes = [(part.rows, target.shape[1]) for part in target.parts]
    outputs = [layout.tensors(name, rank, shape, code) for name, shape in zip(names, shapes, strict=True)]
    stored = (*outputs[0], *(info for infos in outputs[1:] for info in infos[1:]))
    kind = "refit" if "refitted" in options else "truncate" if "decomposition" in options else "factorize"
    kind += "_shared" if target.followers else ""
    settings = {"rank": rank, "layout": layout.name, **({"transposed": True} if target.transposed else {})}
    return Step(kind, target.weight, inputs, stored, {**settings, **options})


def _notes(
    source: Source,
    dropped: Sequence[str],
    copies: Sequence[TensorInfo],
    targets: Sequence[Target],
    request: RankRequest,
    untouched: int,
    share_layers: int,
) -> list[str]:
    notes = list(source.notes)
    smaller = [target for target in targets if len(target.parts) < share_layers]
    if smaller:
        sizes = dict.fromkeys(f"{len(t.parts)} from layer {layer_number(t.module)} on" for t in smaller)
        notes.append(f"groups of fewer than {share_layers} layers: {listing(list(sizes))}")
    if source.config_only:
        notes.append(f"{source.where} has no weights here; the plan was made from config.json alone")
    if dropped:
        kinds = sorted({suffix(name.split(".", 1)[-1]) for name in dropped})
        notes.append(f"{len(dropped)} legacy buffers are dropped ({', '.join(kinds)}); no current model reads them")
    if copies:
        notes.append(f"{copies[0].name} is dropped: it must be a copy of the embedding, which is stored once")
    budget = request.budget(targets, untouched)
    if request.multiple > 1 and budget is not None:
        left = budget - sum(target.params for target in targets)
        notes.append(
            f"ranks are multiples of {request.multiple}, which leaves {left:,} parameters of the budget unused "
            f"({left / budget:.1%})"
        )
    dense = [target for target in targets if target.rank is None]
    for reason in dict.fromkeys(target.reason for target in dense):
        modules = [part.module for target in dense if target.reason == reason for part in target.parts]
        notes.append(f"{len(modules)} targets stay dense, {reason}: {listing(modules)}")
    return notes


def planned(steps: Iterable[Step]) -> str:
    """How many matrices of a job the fast solver is tried on, as a note."""
    factored = [step for step in steps if step.kind == "factorize"]
    count = sum(step.options.get("solver") == "fast" for step in factored)
    if count == len(factored):
        return f"fast solver (on the CPU): all {count} matrices"
    others = "the others are too small, or their ranks too high, for it to pay"
    return f"fast solver (on the CPU): {count} of {len(factored)} matrices; {others}"
