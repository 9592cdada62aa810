"""What a conversion does: counts, sizes, needs, and the steps of the job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from svdconvert.grids import PACKED, Grid
from svdconvert.names import expert, layer_number
from svdconvert.planning import memory
from svdconvert.planning.healing_needs import HealingNeeds
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.planning.target_kinds import TargetKind, kinds_of
from svdconvert.planning.text_memory import TextPasses
from svdconvert.tensors import TensorInfo


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
        opening_bytes: memory that reading the source's tokenizer takes before the work begins.
        passes: what is run on a text; None where none is needed.
        checked: whether the result is loaded at the end.
        healing: what healing takes; None where the result is not healed.
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
    opening_bytes: int = 0
    passes: TextPasses | None = None
    checked: bool = True
    healing: HealingNeeds | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank, as config.json's ``svd_ranks``."""
        return {part.module: t.rank for t in self.targets if t.rank is not None for part in t.parts}

    @property
    def shared(self) -> dict[str, str]:
        """Module path -> that of the layer whose input-side factor it uses, as config.json's ``svd_shared``."""
        return {part.module: t.module for t in self.targets if t.rank is not None for part in t.followers}

    @property
    def grids(self) -> dict[str, Grid]:
        """Name of a weight that is stored in few bits, as the result would have it, -> its grid."""
        found: dict[str, Grid] = {}
        for step in self.steps:
            if step.kind == "round":
                stems = [info.name.removesuffix(PACKED) for info in step.outputs if info.name.endswith(f".{PACKED}")]
                grids = [Grid(*grid) for grid in step.options["grids"] if grid is not None]
                found |= {f"{stem}weight": grid for stem, grid in zip(stems, grids, strict=True)}
        return found

    @cached_property
    def groups(self) -> list[TargetKind]:
        """The targets, summed up by kind."""
        return kinds_of(self.targets)

    @property
    def training_bytes(self) -> tuple[int, int]:
        """Memory of weights, gradients and optimiser for full fine-tuning, before and after; no activations."""
        return memory.training_bytes(self.params_before), memory.training_bytes(self.params_after)

    def peak_bytes(self, workers: int = 1) -> int:
        """Estimated peak of host memory of the whole conversion, calibration and check included, on the CPU.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        return max(
            self.solving_bytes(workers),
            memory.BASE_BYTES + self.opening_bytes,
            memory.check_bytes(self.params_after, self.bytes_after, self._held_in_check()) if self.checked else 0,
            0 if self.passes is None else self.passes.peak_bytes(workers),
            0 if self.healing is None else self.healing.memory_bytes,
        )

    def solving_bytes(self, workers: int = 1) -> int:
        """Estimated peak while matrices are solved, or rounded to few bits, on the CPU.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        solving = memory.host_bytes(list(self._solved()), workers, self._copied(), self._solved_groups())
        return max(solving, memory.BASE_BYTES + self._rounding_bytes(workers))

    @property
    def worker_bytes(self) -> int:
        """What every further worker adds to that."""
        return self.solving_bytes(2) - self.solving_bytes(1)

    def device_bytes(self, workers: int = 1) -> int:
        """Estimated peak of a GPU's memory when solving on one.

        Args:
            workers: matrices, or groups of them, in work at the same time.
        """
        return max(memory.device_bytes(self._solved(), workers, self._solved_groups()), self._rounding_bytes(workers))

    def _rounding_bytes(self, workers: int) -> int:
        return memory.rounding_bytes([target.shape for target in self.targets if target.rounded], workers)

    def _held_in_check(self) -> int:
        """Parameters that are in memory while the result is run block by block, at most: a block, with one expert."""
        sizes: dict[tuple[int, str], int] = {}

        def add(name: str, size: int, part: str) -> None:
            place = layer_number(name), part
            sizes[place] = sizes.get(place, 0) + size

        rounded = {target.weight: target.params for target in self.targets if target.rounded}
        for step in self.steps:
            if step.key in rounded:
                add(step.key, rounded[step.key], expert(step.key))
                continue
            for info in step.outputs:
                add(info.name, info.size, expert(info.name))
        blocks = {number for number, _ in sizes if number >= 0}
        apart = {number: [size for (n, part), size in sizes.items() if n == number and part] for number in blocks}
        return max((sizes.get((n, ""), 0) + max(apart[n], default=0) for n in blocks), default=0)

    def _ranked(self) -> Iterator[tuple[Target, int, Step]]:
        """The targets that get a rank."""
        ranked = {target.weight: target for target in self.targets if target.rank}
        for step in self.steps:
            target = ranked.get(step.key)
            if target is not None and target.rank is not None:
                yield target, target.rank, step

    def _solved(self) -> Iterator[memory.SolvedMatrix]:
        """The single ones of them."""
        for target, rank, step in self._ranked():
            if not target.followers:
                read, written = (sum(info.nbytes for info in infos) for infos in (step.inputs, step.outputs))
                yield memory.SolvedMatrix(min(target.shape), max(target.shape), rank, read, written)

    def _solved_groups(self) -> Iterator[memory.SolvedGroup]:
        """Those that share a factor."""
        for target, rank, step in self._ranked():
            if target.followers:
                (stacked, columns), (down, *ups) = target.shape, step.outputs
                yield memory.SolvedGroup(
                    columns=columns,
                    rows=max(part.rows for part in target.parts),
                    stacked=stacked if stacked < columns else 0,
                    rank=rank,
                    read=max(info.nbytes for info in step.inputs),
                    written=max(up.nbytes for up in ups),
                    shared=down.nbytes,
                    metered=self.passes is not None,
                )

    def _copied(self) -> Iterator[memory.CopiedTensor]:
        """The tensors that are copied."""
        for step in self.steps:
            if step.kind == "copy":
                one, (other,) = step.inputs[0], step.outputs
                turned = one.cut is not None and one.cut.turned
                yield memory.CopiedTensor(one.nbytes, other.nbytes, turned, one.dtype != other.dtype)

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
            "peak_memory_bytes_per_worker": self.worker_bytes,
            "training_bytes": {"before": before, "after": after},
            **({} if self.healing is None else {"healing": asdict(self.healing)}),
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }
