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
from svdconvert.layouts import DEFAULT, Layout


@dataclass(frozen=True, slots=True)
class Target:
    """One weight matrix that may be factored.

    Attributes:
        module: path of its linear layer inside the base model, for example ``layers.0.attention.dense``.
        weight: name of the weight tensor in the source.
        shape: ``(out, in)``.
        rank: rank it is given, or None where it stays dense.
        reason: why it stays dense; empty otherwise.
        layout: how its product is stored.
        transposed: whether the source stores it as [in, out].
    """

    module: str
    weight: str
    shape: tuple[int, int]
    rank: int | None = None
    reason: str = ""
    layout: Layout = DEFAULT
    transposed: bool = False

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

    @property
    def least_share(self) -> float:
        """Fraction of the dense parameters that rank 1 costs."""
        return self.layout.cost(1, self.shape) / self.dense_params


@dataclass(frozen=True)
class RankRequest:
    """What the user asked for: exactly one of a rank (with exceptions), a kept fraction or a model size.

    Attributes:
        rank: rank of every target that no pattern names.
        patterns: pattern -> rank, later ones win.
        keep: fraction of the target parameters to keep, 0 < keep < 1.
        params: parameters that the whole converted model may have.
        factor_all: factor also where that saves nothing.
    """

    rank: int | None = None
    patterns: Mapping[str, int] | None = None
    keep: float | None = None
    params: int | None = None
    factor_all: bool = False

    def __post_init__(self) -> None:
        asked = [self.rank is not None or bool(self.patterns), self.keep is not None, self.params is not None]
        if sum(asked) != 1:
            raise InputError("give exactly one of --rank, --keep and --params")
        for name, rank in {"": self.rank, **(self.patterns or {})}.items():
            if rank is not None and rank < 1:
                raise InputError(f"rank {rank}{f' for {name}' if name else ''} is not possible; the least is 1")
        if self.keep is not None and not 0 < self.keep < 1:
            raise InputError(f"--keep {self.keep:g} must lie between 0 and 1 (the fraction of target parameters kept)")

    def settings(self) -> dict[str, object]:
        """The request in JSON types, for the record and for comparing an interrupted job with its continuation."""
        return {
            "rank": self.rank,
            "rank_patterns": dict(self.patterns or {}),
            "keep": self.keep,
            "params": self.params,
            "factor_all": self.factor_all,
        }


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
            raise InputError(f"--rank {option!r} is neither a whole number nor PATTERN=NUMBER")
        if pattern:
            patterns[pattern] = int(value)
        elif default is not None:
            raise InputError(f"--rank was given twice without a pattern ({default} and {value})")
        else:
            default = int(value)
    return default, patterns


def parse_count(text: str) -> int:
    """A number of parameters: ``526503936``, ``500M``, ``1.4B``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().replace("_", "").replace(",", ""), re.IGNORECASE)
    if not match:
        raise InputError(f"{text!r} is no number of parameters; write 1400000000, 1400M or 1.4B")
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
    if request.params is not None:
        targets = _uniform(targets, _fraction_for(targets, request.params, untouched_params))
    elif request.keep is not None:
        targets = _uniform(targets, request.keep)
    else:
        targets = _fixed(targets, request)
    if request.factor_all:
        return list(targets)
    return [_dense_if_no_saving(target) for target in targets]


def _fixed(targets: Sequence[Target], request: RankRequest) -> list[Target]:
    patterns = request.patterns or {}
    for pattern in patterns:
        if not any(matches(target.module, pattern) for target in targets):
            raise InputError(
                f"--rank {pattern}={patterns[pattern]} matches no target; targets are named like {targets[0].module!r}"
            )
    result = []
    for target in targets:
        chosen = [rank for pattern, rank in patterns.items() if matches(target.module, pattern)]
        rank = chosen[-1] if chosen else request.rank
        if rank is None:
            result.append(replace(target, reason="no --rank names it"))
            continue
        if rank > min(target.shape):
            if not chosen and any(rank <= min(other.shape) for other in targets):
                # Keys and values of grouped-query attention are far smaller than the rest.
                reason = f"rank {rank} is more than they have (break-even {target.break_even:,.1f})"
                result.append(replace(target, reason=reason))
                continue
            raise InputError(
                f"rank {rank} is larger than {target.module} allows, a {target.shape[0]} x {target.shape[1]} matrix; "
                f"the highest is {min(target.shape)}, and it saves something only below {target.break_even:,.1f}"
            )
        result.append(replace(target, rank=rank))
    return result


def _uniform(targets: Sequence[Target], keep: float) -> list[Target]:
    """The same fraction of every matrix, rounded down to a whole rank."""
    result = []
    for target in targets:
        # The allowance is for fractions that came from a number of parameters and are a rounding below it.
        rank = target.layout.highest_rank(target.shape, keep * target.dense_params + 1e-6)
        if rank < 1:
            raise InputError(
                f"keeping {keep:.4g} of {target.module} ({target.shape[0]} x {target.shape[1]}) leaves no rank at all; "
                f"keep at least {target.least_share:.3g}"
            )
        result.append(replace(target, rank=rank))
    return result


def _fraction_for(targets: Sequence[Target], params: int, untouched: int) -> float:
    dense = sum(target.dense_params for target in targets)
    # A uniform fraction is as small as it can be when the matrix that suffers most is left with rank 1.
    share = max(target.least_share for target in targets)
    least = untouched + math.ceil(share * dense)
    if not least <= params < untouched + dense:
        raise InputError(
            f"--params {params:,} cannot be met: the targets allow from {least:,} (no matrix below rank 1) "
            f"to {untouched + dense:,} (dense) parameters"
        )
    return (params - untouched) / dense


def _dense_if_no_saving(target: Target) -> Target:
    if target.rank is not None and target.params >= target.dense_params:
        return replace(
            target, rank=None, reason=f"rank {target.rank} saves nothing (break-even {target.break_even:,.1f})"
        )
    return target
