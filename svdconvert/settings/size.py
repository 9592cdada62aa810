"""How small a model becomes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.row import option, whole


def parse_rank_options(options: Sequence[str]) -> tuple[int | None, dict[str, int]]:
    """``--rank 768 --rank attention.dense=512`` -> ``(768, {"attention.dense": 512})``.

    Raises:
        InputError: an option is neither N nor PATTERN=N, or there are two plain ranks.
    """
    default: int | None = None
    patterns: dict[str, int] = {}
    for text in options:
        pattern, equals, value = text.rpartition("=")
        if not re.fullmatch(r"-?\d+", value) or (equals and not pattern):
            raise InputError(f"{asked('rank', text)} is neither a whole number nor PATTERN=NUMBER")
        if pattern:
            patterns[pattern] = int(value)
        elif default is not None:
            raise InputError(f"{asked('rank')} is given twice without a pattern ({default} and {value}); give it once")
        else:
            default = int(value)
    return default, patterns


def parse_count(text: str | int | None) -> int | None:
    """A number of parameters: ``526503936``, ``500M``, ``1.4B``; what is no text is taken as it is.

    Raises:
        InputError: it is not a number of parameters.
    """
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().replace("_", "").replace(",", ""), re.IGNORECASE)
    if not match:
        raise InputError(f"{asked('params', text)} is not a number of parameters; write 1400000000, 1400M or 1.4B")
    return round(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()])


def default_and_patterns(rank: int | Mapping[str, int] | None) -> tuple[int | None, dict[str, int]]:
    """The rank of all targets, and those of patterns, as :func:`svdconvert.convert` takes both in one.

    Raises:
        InputError: a rank is not a whole number.
    """
    if not isinstance(rank, Mapping):
        return None if rank is None else whole("rank", rank), {}
    patterns = {pattern: whole("rank", one, {pattern: one}) for pattern, one in rank.items()}
    return patterns.pop("*", None), patterns


@dataclass(frozen=True)
class Size:
    """Exactly one of a rank (with exceptions), a kept fraction, the size of the model, or what it may lose.

    Attributes:
        rank: rank of every target that no pattern names.
        patterns: pattern -> rank; the last match wins.
        keep: fraction of the target parameters to keep, 0 < keep < 1.
        params: parameters that the whole converted model may have.
        max_loss: nats per token that the smallest size to be found may add to the loss of held-out text.
        max_kl: likewise the mean divergence KL(dense || converted) of its predictions.
        multiple: every rank is a multiple of it; the ranks of a budget are rounded down.
        factor_all: factor also where that saves nothing.
    """

    rank: int | None = option(
        None,
        "--rank",
        "Rank of every target, or of those a pattern names (repeatable; the last match wins): --rank 768 --rank "
        "attention.dense=512 --rank 'layers.0.*=1024'.",
        keyword="rank",
        group="Size",
        metavar="N|PATTERN=N",
        repeatable=True,
    )
    patterns: Mapping[str, int] = option(
        {},
        "--rank",
        keyword="rank",
        group="Size",
        part_of="rank",
        write=lambda patterns: [f"{pattern}={rank}" for pattern, rank in patterns.items()],
    )
    keep: float | None = option(
        None,
        "--keep",
        "Instead: fraction of the target parameters to keep.",
        keyword="keep",
        group="Size",
        kind="number",
        metavar="FRACTION",
    )
    params: int | None = option(
        None,
        "--params",
        "Instead: parameters of the whole result, for example 1.4B.",
        keyword="params",
        group="Size",
        metavar="COUNT",
        read=parse_count,
    )
    max_loss: float | None = option(
        None,
        "--max-loss",
        "Instead: the smallest size that adds at most so many nats per token, measured on a part of the text.",
        keyword="max_loss",
        group="Size",
        kind="number",
        metavar="NATS",
    )
    max_kl: float | None = option(
        None,
        "--max-kl",
        "Instead: the smallest size whose predictions are at most so many nats per token from the model's, likewise.",
        keyword="max_kl",
        group="Size",
        kind="number",
        metavar="NATS",
    )
    multiple: int = option(
        1,
        "--rank-multiple",
        "Every rank a multiple of N, 8 or 64 say, as matrix kernels like them; budgets are rounded down.",
        keyword="rank_multiple",
        group="Size",
        kind="whole",
    )
    factor_all: bool = option(
        False,
        "--factor-all",
        "Factor also where the rank saves nothing.",
        keyword="factor_all",
        group="Size",
        kind="flag",
    )

    def check(self) -> None:
        """Refuse sizes that no model can have.

        Raises:
            InputError: not exactly one is given, or a number is impossible.
        """
        others = {"keep": self.keep, "params": self.params, "max_loss": self.max_loss, "max_kl": self.max_kl}
        given_sizes = [name for name, value in others.items() if value is not None]
        if len(given_sizes) + (self.rank is not None or bool(self.patterns)) != 1:
            *words, last = (asked(name) for name in ("rank", *others))
            raise InputError(f"give exactly one of {', '.join(words)} and {last}")
        if self.multiple < 1:
            raise InputError(f"{asked('rank_multiple', self.multiple)} is too small; the least is 1")
        for name, rank in {"": self.rank, **self.patterns}.items():
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
        if self.limit is not None:
            name, nats = self.limit
            if not 0 < nats < math.inf:
                raise InputError(f"{asked(name, nats)} must be above 0 and finite (nats per token)")

    @property
    def limit(self) -> tuple[str, float] | None:
        """``max_loss`` or ``max_kl`` and its value, where the size is to be found by measuring; None otherwise."""
        for name, nats in (("max_loss", self.max_loss), ("max_kl", self.max_kl)):
            if nats is not None:
                return name, nats
        return None

    def at(self, share: float) -> Size:
        """The same with a fraction to keep in the place of what may be lost."""
        return replace(self, keep=share, max_loss=None, max_kl=None)

    def key(self) -> dict[str, object]:
        """The size in JSON types, for the record and for comparing an interrupted job with its continuation.

        What it may lose is left out where it is not limited, as in the records of earlier versions.
        """
        return {
            "rank": self.rank,
            "rank_patterns": dict(self.patterns),
            "keep": self.keep,
            "params": self.params,
            "factor_all": self.factor_all,
            "rank_multiple": self.multiple,
            **dict([self.limit] if self.limit is not None else []),
        }

    def budget(self, target_params: int, other_params: int) -> int | None:
        """Parameters that the target weights may have together; None where ranks or a loss were asked for.

        Args:
            target_params: parameters of all targets.
            other_params: those of the rest of the model.
        """
        if self.params is not None:
            return self.params - other_params
        return None if self.keep is None else int(self.keep * target_params)
