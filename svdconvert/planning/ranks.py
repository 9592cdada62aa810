"""From what the user asked for to one rank per matrix.

A factored m x n matrix of rank r stores r (m + n) numbers, or r (m + n - r) in the pivoted layout; it is smaller only
while that is below m n. A target whose rank would not make it smaller stays dense.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svdconvert.errors import InputError
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import DEFAULT
from svdconvert.sentences import asked


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
        """Path of the source's layer that it is, or is a part of."""
        return self.fused or self.module

    def is_named(self, pattern: str) -> bool:
        """Whether a pattern names it, or the fused projection that it is a part of."""
        return matches(self.module, pattern) or matches(self.layer, pattern)


@dataclass(frozen=True, slots=True)
class Target:
    """One weight matrix that may be factored, or those of several layers that are to share their input-side factor.

    The matrices of a group count as one, stacked: at rank r they hold r n numbers once, and r m for each of them.

    Attributes:
        module: path of its linear layer inside the base model, for example ``layers.0.attention.dense``; of a group,
            that of the first layer, which is the one that holds the shared factor.
        weight: name of the weight tensor in the source.
        shape: ``(out, in)`` of the matrix, or of the stack.
        rank: rank it is given, or None where it stays dense.
        reason: why it stays dense; empty otherwise.
        layout: how its product is stored.
        transposed: whether the source stores it as [in, out].
        followers: the other layers of the group.
        fused: see :class:`TargetLayer`; the weight is then a name for some of what the source stores together.
    """

    module: str
    weight: str
    shape: tuple[int, int]
    rank: int | None = None
    reason: str = ""
    layout: Layout = DEFAULT
    transposed: bool = False
    followers: tuple[TargetLayer, ...] = ()
    fused: str | None = None

    @property
    def parts(self) -> tuple[TargetLayer, ...]:
        """Its layers, the first one included."""
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
    def break_even(self) -> float:
        """The rank from which on nothing is saved."""
        return self.layout.break_even(self.shape)

    def least_share(self, rank: int = 1) -> float:
        """Fraction of the dense parameters that a rank costs, by default the least."""
        return self.layout.cost(rank, self.shape) / self.dense_params


@dataclass(frozen=True)
class RankRequest:
    """What the user asked for: exactly one of a rank (with exceptions), a kept fraction or a model size.

    Attributes:
        rank: rank of every target that no pattern names.
        patterns: pattern -> rank, later ones win.
        keep: fraction of the target parameters to keep, 0 < keep < 1.
        params: parameters that the whole converted model may have.
        factor_all: factor also where that saves nothing.
        multiple: every rank is a multiple of it; a budget's ranks are rounded down.
    """

    rank: int | None = None
    patterns: Mapping[str, int] | None = None
    keep: float | None = None
    params: int | None = None
    factor_all: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        sizes = [self.rank is not None or bool(self.patterns), self.keep is not None, self.params is not None]
        if sum(sizes) != 1:
            raise InputError(f"give exactly one of {asked('rank')}, {asked('keep')} and {asked('params')}")
        if self.multiple < 1:
            raise InputError(f"{asked('rank_multiple', self.multiple)} is too small; the least is 1")
        for name, rank in {"": self.rank, **(self.patterns or {})}.items():
            if rank is None:
                continue
            given = asked("rank", {name: rank} if name else rank)
            if rank < 1:
                raise InputError(f"{given} is too small; the least is 1")
            if rank % self.multiple:
                below = rank - rank % self.multiple
                raise InputError(
                    f"{given} does not go with {asked('rank_multiple', self.multiple)}; give a multiple, "
                    + (f"{below} or {below + self.multiple}" if below else f"{self.multiple}")
                )
        if self.keep is not None and not 0 < self.keep < 1:
            fraction = "the fraction of target parameters kept"
            raise InputError(f"{asked('keep', self.keep)} must lie between 0 and 1 ({fraction})")

    def settings(self) -> dict[str, object]:
        """The request in JSON types, for the record and for comparing an interrupted job with its continuation."""
        return {
            "rank": self.rank,
            "rank_patterns": dict(self.patterns or {}),
            "keep": self.keep,
            "params": self.params,
            "factor_all": self.factor_all,
            "rank_multiple": self.multiple,
        }

    def budget(self, targets: Sequence[Target], untouched_params: int) -> int | None:
        """Parameters that the target weights may have together; None where ranks were asked for.

        Args:
            targets: all targets.
            untouched_params: parameters of the model outside the target weights.
        """
        if self.params is not None:
            return self.params - untouched_params
        if self.keep is not None:
            return int(self.keep * sum(target.dense_params for target in targets))
        return None


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


def parse_rank_options(options: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """``--rank 768 --rank attention.dense=512`` -> ``(768, {"attention.dense": 512})``.

    Raises:
        InputError: an option is neither N nor PATTERN=N, or there are two plain ranks.
    """
    default: int | None = None
    patterns: dict[str, int] = {}
    for option in options:
        pattern, equals, value = option.rpartition("=")
        if not re.fullmatch(r"-?\d+", value) or (equals and not pattern):
            raise InputError(f"{asked('rank', option)} is neither a whole number nor PATTERN=NUMBER")
        if pattern:
            patterns[pattern] = int(value)
        elif default is not None:
            raise InputError(f"{asked('rank')} is given twice without a pattern ({default} and {value}); give it once")
        else:
            default = int(value)
    return default, patterns


def parse_count(text: str) -> int:
    """A number of parameters: ``526503936``, ``500M``, ``1.4B``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().replace("_", "").replace(",", ""), re.IGNORECASE)
    if not match:
        raise InputError(f"{asked('params', text)} is not a number of parameters; write 1400000000, 1400M or 1.4B")
    return round(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()])


def assign(targets: Sequence[Target], request: RankRequest, untouched_params: int) -> list[Target]:
    """Give every target its rank.

    Args:
        targets: all targets, without ranks.
        request: what the user asked for.
        untouched_params: parameters of the model outside the target weights.

    Returns:
        The targets in the same order, each with a rank or a reason to stay dense.

    Raises:
        InputError: a rank exceeds its matrix, a pattern matches nothing, or the size asked for cannot be met.
    """
    if request.multiple > 1 and (request.params is not None or request.keep is not None):
        _check_multiple(targets, request.multiple)
    if request.params is not None:
        targets = _uniform(targets, _fraction_for(targets, request, untouched_params), request.multiple)
    elif request.keep is not None:
        targets = _uniform(targets, request.keep, request.multiple)
    else:
        targets = _fixed(targets, request)
    if request.factor_all:
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


def _fixed(targets: Sequence[Target], request: RankRequest) -> list[Target]:
    patterns = request.patterns or {}
    for pattern in patterns:
        if not any(_names(pattern, target) for target in targets):
            raise InputError(
                f"{asked('rank', {pattern: patterns[pattern]})} matches no target; targets have names like "
                f"{targets[0].module!r}"
            )
    result = []
    for target in targets:
        chosen = [rank for pattern, rank in patterns.items() if _names(pattern, target)]
        rank = chosen[-1] if chosen else request.rank
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
        InputError: it names some layers of a group and leaves out others.
    """
    named = [part.module for part in target.parts if part.is_named(pattern)]
    if named and len(named) < len(target.parts):
        other = next(part.module for part in target.parts if part.module not in named)
        raise InputError(
            f"a pattern of {asked('rank')}, {pattern}, matches {named[0]} but not {other}, and the two share one "
            f"factor and so have one rank; match both, or use another {asked('share_layers')}"
        )
    return bool(named)


def _uniform(targets: Sequence[Target], keep: float, multiple: int) -> list[Target]:
    """The same fraction of every matrix, rounded down to a whole rank, or to a multiple."""
    result = []
    for target in targets:
        # The allowance is for fractions that came from a number of parameters and are a rounding below it.
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


def _fraction_for(targets: Sequence[Target], request: RankRequest, untouched: int) -> float:
    params, least_rank = request.params or 0, request.multiple
    dense = sum(target.dense_params for target in targets)
    # A uniform fraction is as small as it can be when the matrix that suffers most is left with the least rank.
    share = max(target.least_share(least_rank) for target in targets)
    least = untouched + math.ceil(share * dense)
    if not least <= params < untouched + dense:
        raise InputError(
            f"{asked('params', params)} cannot be met; give a number from {least:,} (no matrix below rank "
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
