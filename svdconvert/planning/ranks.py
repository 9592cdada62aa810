"""From the requested size to one rank per matrix.

A factored m x n matrix of rank r stores r (m + n) numbers, or r (m + n - r) in the pivoted layout; it is smaller only
while that is below m n. A target whose rank would not make it smaller stays dense.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from svdconvert.errors import InputError
from svdconvert.grids import Grid
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import DEFAULT_LAYOUT
from svdconvert.names import layer_number
from svdconvert.planning.fit import enough
from svdconvert.planning.memory import TRAINING_BYTES_PER_PARAMETER
from svdconvert.sentences import asked
from svdconvert.settings.size import Size
from svdconvert.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class TargetLayer:
    """One linear layer of a target.

    Attributes:
        module: path inside the base model.
        weight: name of the weight tensor in the source.
        rows: number of outputs.
        fused: of a part of a fused projection, the path of that; None for a layer of the source.
    """

    module: str
    weight: str
    rows: int
    fused: str | None = None

    @property
    def layer(self) -> str:
        """Path of the layer in the source that this is, or is a part of."""
        return self.fused or self.module

    def is_named(self, pattern: str) -> bool:
        """Whether a pattern names this layer, or the fused projection that it is a part of."""
        return matches(self.module, pattern) or matches(self.layer, pattern)


@dataclass(frozen=True, slots=True)
class Target:
    """A weight matrix that may be factored, or those of several layers that share their input-side factor.

    The matrices of a group count as one, stacked: at rank r they hold r n numbers once, and r m for each of them.

    Attributes:
        module: path of its linear layer inside the base model, for example ``layers.0.attention.dense``; of a group,
            that of the first layer, which is the one that holds the shared factor.
        weight: name of the weight tensor in the source.
        shape: ``(out, in)`` of the matrix, or of the stack.
        rank: rank it is given, or None where it stays dense.
        reason: why it stays dense; empty otherwise.
        layout: how its product is stored.
        grids: on which each of its weights is stored, in the order of the layout, or of the dense weight; None for a
            weight in a floating type, and empty where all are.
        transposed: whether the source stores it as [in, out].
        followers: the other layers of the group.
        fused: see :class:`TargetLayer`; the weight is then a name for some of what the source stores together.
    """

    module: str
    weight: str
    shape: tuple[int, int]
    rank: int | None = None
    reason: str = ""
    layout: Layout = DEFAULT_LAYOUT
    grids: tuple[Grid | None, ...] = ()
    transposed: bool = False
    followers: tuple[TargetLayer, ...] = ()
    fused: str | None = None

    @property
    def parts(self) -> tuple[TargetLayer, ...]:
        """All its layers, the first one included."""
        rows = self.shape[0] - sum(part.rows for part in self.followers)
        return (TargetLayer(self.module, self.weight, rows, self.fused), *self.followers)

    @property
    def dense_params(self) -> int:
        """m n."""
        return self.shape[0] * self.shape[1]

    @property
    def params(self) -> int:
        """Numbers stored for the weight, biases aside."""
        return self.dense_params if self.rank is None else self.layout.cost(self.rank, self.shape)

    @property
    def rounded(self) -> bool:
        """Whether any of its weights is stored on a grid."""
        return any(grid is not None for grid in self.grids)

    def tensors(self, weight: str, code: str) -> tuple[TensorInfo, ...]:
        """The tensors that take the place of its weight; of a single matrix.

        Args:
            weight: name of the dense weight in the result.
            code: safetensors' code of the type of weights, and of scales.
        """
        plain: tuple[TensorInfo, ...] = (TensorInfo(weight, code, self.shape),)
        if self.rank is not None:
            plain = self.layout.tensors(weight, self.rank, self.shape, code)
        if not self.rounded:
            return plain
        stored: list[TensorInfo] = []
        for info, grid in zip(plain, self.grids, strict=True):
            rows, columns = info.shape
            stored += [info] if grid is None else grid.tensors(info.name, (rows, columns), code)
        return tuple(stored)

    @property
    def break_even(self) -> float:
        """The lowest rank that saves nothing, as a real number."""
        return self.layout.break_even(self.shape)

    def least_share(self, rank: int = 1) -> float:
        """Fraction of the dense parameters that a rank costs, by default the lowest rank."""
        return self.layout.cost(rank, self.shape) / self.dense_params


def matches(module: str, pattern: str) -> bool:
    """Whether a pattern names a module: the whole path or its end at a dot, with shell wildcards.

    >>> matches("layers.3.attention.dense", "attention.dense")
    True
    >>> matches("layers.3.attention.dense", "layers.3.*")
    True
    >>> matches("layers.3.mlp.dense_h_to_4h", "dense")
    False
    """
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")


def assign(targets: Sequence[Target], size: Size, untouched_params: int) -> list[Target]:
    """Give every target its rank.

    Args:
        targets: all targets, without ranks.
        size: the requested size.
        untouched_params: parameters of the model outside the target weights.

    Returns:
        The targets in the same order, each with a rank or a reason to stay dense.

    Raises:
        InputError: a rank exceeds its matrix, a pattern matches nothing, or the size asked for cannot be met.
    """
    if size.multiple > 1 and (size.params is not None or size.keep is not None):
        _check_multiple(targets, size.multiple)
    if size.params is not None:
        targets = _uniform(targets, _fraction_for(targets, size, untouched_params), size.multiple)
    elif size.keep is not None:
        targets = _uniform(targets, size.keep, size.multiple)
    else:
        targets = _fixed(targets, size)
    if size.factor_all:
        return [_dense_if_too_high(target) for target in targets]
    return [_dense_if_no_saving(target) for target in targets]


def _check_multiple(targets: Sequence[Target], multiple: int) -> None:
    for target in targets:
        if multiple >= target.break_even:
            raise InputError(
                f"{asked('rank_multiple', multiple)} leaves no rank that saves anything in {target.module}, a "
                f"{target.shape[0]} x {target.shape[1]} matrix (break-even {target.break_even:,.1f}); "
                f"use a smaller one, or choose other {asked('targets')}"
            )


def _fixed(targets: Sequence[Target], size: Size) -> list[Target]:
    patterns = size.patterns
    for pattern in patterns:
        if not any(_names(pattern, target) for target in targets):
            raise InputError(
                f"{asked('rank', {pattern: patterns[pattern]})} matches no target; targets have names like "
                f"{targets[0].module!r}"
            )
    result = []
    for target in targets:
        chosen = [rank for pattern, rank in patterns.items() if _names(pattern, target)]
        rank = chosen[-1] if chosen else size.rank
        if rank is None:
            result.append(replace(target, reason="no rank is given for them"))
            continue
        if rank > min(target.shape):
            if not chosen and any(rank <= min(other.shape) for other in targets):
                # Keys and values of grouped-query attention are far smaller than the rest.
                reason = f"rank {rank} is more than they have (break-even {target.break_even:,.1f})"
                result.append(replace(target, reason=reason))
                continue
            raise InputError(
                f"rank {rank} is larger than {target.module} allows, a {target.shape[0]} x {target.shape[1]} matrix"
                f"{' including the layers that share its factor' if target.followers else ''}; "
                f"the highest is {min(target.shape)}, and it saves something only below {target.break_even:,.1f}"
            )
        result.append(replace(target, rank=rank))
    return result


def _names(pattern: str, target: Target) -> bool:
    """Whether a pattern names a target.

    Raises:
        InputError: it names only some layers of a group.
    """
    named = [part.module for part in target.parts if part.is_named(pattern)]
    if named and len(named) < len(target.parts):
        within = layer_number(target.module) == layer_number(target.followers[0].module)
        remedy = f"leave out {asked('share_experts')}" if within else f"use another {asked('share_layers')}"
        other = next(part.module for part in target.parts if part.module not in named)
        raise InputError(
            f"a pattern of {asked('rank')}, {pattern}, matches {named[0]} but not {other}, and the two share one "
            f"factor and so have one rank; match both, or {remedy}"
        )
    return bool(named)


def _uniform(targets: Sequence[Target], keep: float, multiple: int) -> list[Target]:
    """The same fraction of every matrix, rounded down to a whole rank, or to a multiple."""
    result = []
    for target in targets:
        # The allowance is for fractions that come from a number of parameters and are rounded down.
        highest = target.layout.highest_rank(target.shape, keep * target.dense_params + 1e-6)
        if highest < multiple:
            left = f"a rank of {highest} at most, below the multiple {multiple}" if highest else "no rank at all"
            least = math.ceil(1000 * target.least_share(multiple)) / 1000
            raise InputError(
                f"keeping {keep:.4g} of {target.module} ({target.shape[0]} x {target.shape[1]}) leaves {left}; "
                f"keep at least {least:g}"
            )
        result.append(replace(target, rank=highest - highest % multiple))
    return result


def _fraction_for(targets: Sequence[Target], size: Size, untouched: int) -> float:
    params, least_rank = size.params or 0, size.multiple
    dense = sum(target.dense_params for target in targets)
    # A uniform fraction is as small as it can be when the matrix that suffers most is left with the least rank.
    share = max(target.least_share(least_rank) for target in targets)
    least = untouched + math.ceil(share * dense)
    if not least <= params < untouched + dense:
        if size.fit is not None:  # what has room as it is was refused before
            more = enough(size.fit, TRAINING_BYTES_PER_PARAMETER * (least - params))
            raise InputError(
                f"{asked(*size.given)} cannot be met, as it leaves room for {params:,} parameters, and no matrix is "
                f"below rank {least_rank} from {least:,} on; give more memory, {more} at least"
            )
        raise InputError(
            f"{asked(*size.given)} cannot be met; give a number from {least:,} (no matrix below rank "
            f"{least_rank}) to {untouched + dense:,} (dense)"
        )
    return (params - untouched) / dense


def _dense_if_too_high(target: Target) -> Target:
    """Leave a target dense that the layout cannot hold at its rank."""
    limit = target.layout.rank_limit(target.shape)
    if target.rank is not None and target.rank > limit:
        return replace(
            target,
            rank=None,
            reason=f"rank {target.rank} is above what the {target.layout.name} layout can hold ({limit})",
        )
    return target


def _dense_if_no_saving(target: Target) -> Target:
    if target.rank is not None and target.params >= target.dense_params:
        return replace(
            target, rank=None, reason=f"rank {target.rank} saves nothing (break-even {target.break_even:,.1f})"
        )
    return target
