"""What a conversion would do, from config and headers alone: counts, sizes, needs, and the job itself.

Nothing here reads tensor data or imports torch, so a plan takes seconds whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.fused import split_tensors
from svdconvert.families.table import dense_architecture
from svdconvert.layouts.table import DEFAULT, layout_named
from svdconvert.methods.table import method_named
from svdconvert.planning import memory
from svdconvert.planning.checks import check_tensors
from svdconvert.planning.conversion_steps import conversion_steps
from svdconvert.planning.kinds import TargetKind, kinds_of
from svdconvert.planning.notes import fast_solver_note, plan_notes
from svdconvert.planning.ranks import RankRequest, Target, assign
from svdconvert.planning.steps import Step, files_bytes, in_order, shard, with_copies
from svdconvert.planning.targets import choose_targets, in_parts, share
from svdconvert.sentences import asked
from svdconvert.solvers import table as fast
from svdconvert.storage.source import Source
from svdconvert.storage.tying import head_copies
from svdconvert.tensors import CODES, FLOATS, TensorInfo, parameters


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
    def groups(self) -> list[TargetKind]:
        """The targets, summed up by kind."""
        return kinds_of(self.targets)

    @property
    def training_bytes(self) -> tuple[int, int]:
        """Memory of weights, gradients and optimiser for full fine-tuning, before and after; no activations."""
        return memory.training_bytes(self.params_before), memory.training_bytes(self.params_after)

    def peak_bytes(self, workers: int = 1) -> int:
        """Estimated peak of host memory when solving on the CPU.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        return memory.host_bytes(self._solved(), workers)

    def device_bytes(self, workers: int = 1) -> int:
        """Estimated peak of a GPU's memory when solving on one.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        return memory.device_bytes(self._solved(), workers)

    def _solved(self) -> Iterator[memory.SolvedMatrix]:
        """The targets that get a rank."""
        ranked = {target.weight: target for target in self.targets if target.rank}
        for step in self.steps:
            if step.key in ranked:
                target = ranked[step.key]
                read, written = (sum(info.nbytes for info in infos) for infos in (step.inputs, step.outputs))
                yield memory.SolvedMatrix(min(target.shape), target.rank or 0, read, written, bool(target.followers))

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
    steps = conversion_steps(
        cut, ranked, row, source.config, dtype, decompositions or {}, refitted or {}, stored, solver
    )
    if copies:
        steps = in_order(with_copies(step, copies, row) for step in steps)
    outputs = [info for step in steps for info in step.outputs]
    shards = shard(outputs, max_shard_bytes)
    notes = plan_notes(source, dropped, copies, ranked, request, untouched, share_layers)
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
        notes=(*notes, fast_solver_note(steps)) if solver == "fast" else tuple(notes),
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
