"""Targets summed up by kind, as a plan shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.names import kind
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step


@dataclass(frozen=True)
class TargetKind:
    """Targets of the same suffix and shape, one line of a plan.

    Attributes:
        name: suffix of the module paths.
        shape: ``(out, in)`` of each.
        count: number of matrices.
        ranks: lowest and highest rank of the factored ones, or None if there are none.
        dense: number of matrices that stay dense.
        break_even: lowest rank that saves nothing; where layers share, that of the largest group.
        dense_params, params: parameters of all of them, before and after.
        shared: layers that share one input-side factor.
        bits: widths of the weights, ascending; empty where all are in floating types.
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
    bits: tuple[int, ...] = ()

    @property
    def width(self) -> str:
        """The widths in words: ``4``, ``3-6``, or nothing."""
        return "-".join(map(str, sorted({*self.bits[:1], *self.bits[-1:]})))

    @property
    def rank(self) -> str:
        """The ranks in words: ``48``, ``42-49``, ``dense``, ``42-49, 1 dense``."""
        if self.ranks is None:
            return "dense"
        lowest, highest = self.ranks
        return (str(lowest) if lowest == highest else f"{lowest}-{highest}") + (
            f", {self.dense} dense" if self.dense else ""
        )


def kinds_of(targets: Iterable[Target]) -> list[TargetKind]:
    """Targets summed up by kind, in the order in which the kinds come."""
    kinds: dict[tuple[str, tuple[int, int]], list[Target]] = {}
    for target in targets:
        kinds.setdefault((kind(target.module), (target.parts[0].rows, target.shape[1])), []).append(target)
    return [_sum(name, shape, same) for (name, shape), same in kinds.items()]


def sizes_by_kind(targets: Iterable[Target], steps: Iterable[Step]) -> dict[str, dict[str, Any]]:
    """Suffix of module paths -> ``matrices``, and ``params`` and ``bytes`` ``before`` and ``after``, in JSON types.

    Args:
        targets: of a plan.
        steps: of that plan. Bytes are those of the tensors that they read and write, positions included.
    """
    by_key = {step.key: step for step in steps}
    kinds: dict[str, dict[str, Any]] = {}
    for target in targets:
        read, written = _bytes(target, by_key)
        before = {"params": target.dense_params, "bytes": read}
        after = {"params": target.params, "bytes": written}
        sizes = kinds.setdefault(
            kind(target.module), {"matrices": 0, **{name: {"before": 0, "after": 0} for name in before}}
        )
        sizes["matrices"] += len(target.parts)
        for name in before:
            sizes[name]["before"] += before[name]
            sizes[name]["after"] += after[name]
    return kinds


def _bytes(target: Target, by_key: Mapping[str, Step]) -> tuple[int, int]:
    """Bytes of the tensors that a target takes before and after."""
    read = written = 0
    for part in target.parts if target.rank is None else target.parts[:1]:
        step, share = by_key.get(part.weight), 1.0
        if step is None:  # all parts of a fused projection stay dense, so that it stays whole
            own = part.module.removeprefix(part.fused or "")
            step = by_key[f"{part.weight.removesuffix(f'{own}.weight')}.weight"]
            share = part.rows * target.shape[1] / step.inputs[0].size
        read += round(share * sum(info.nbytes for info in step.inputs))
        written += round(share * sum(info.nbytes for info in step.outputs))
    return read, written


def _sum(name: str, shape: tuple[int, int], same: list[Target]) -> TargetKind:
    ranks = [target.rank for target in same if target.rank is not None]
    return TargetKind(
        name=name,
        shape=shape,
        count=sum(len(target.parts) for target in same),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        dense=sum(len(target.parts) for target in same if target.rank is None),
        break_even=max(target.break_even for target in same),
        dense_params=sum(target.dense_params for target in same),
        params=sum(target.params for target in same),
        shared=max(len(target.parts) for target in same),
        bits=_widths(same),
    )


def _widths(same: list[Target]) -> tuple[int, ...]:
    """Widths of their weights; those in floating types count as 16 bits."""
    if not any(target.rounded for target in same):
        return ()
    return tuple(sorted({16 if grid is None else grid.bits for target in same for grid in target.grids or (None,)}))


def widths_in_words(targets: Iterable[Target]) -> str:
    """``24 matrices: 10 at 4 bits, 12 at 6, 2 as they were; 3 of them as products``."""
    every = list(targets)
    narrowest = [min((grid.bits for grid in target.grids if grid is not None), default=0) for target in every]
    counts = {bits: narrowest.count(bits) for bits in sorted(set(narrowest))}
    asis = counts.pop(0, 0)
    parts = [f"{count} at {bits}{' bits' if place == 0 else ''}" for place, (bits, count) in enumerate(counts.items())]
    parts += [f"{asis} as before"] if asis else []
    products = sum(target.rank is not None for target in every)
    return f"{len(every)} matrices: {', '.join(parts)}" + (f"; {products} as products of low rank" if products else "")
