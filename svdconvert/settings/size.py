"""How small a model becomes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from operator import index

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.row import option, whole
from svdconvert.words import byte_count, size_text

# Bits of a stored weight: the type of the model itself, 16 as a rule, and the integer grids.
WIDTHS = (16, 8, 7, 6, 5, 4, 3, 2)
USUAL_WIDTHS = (16, 8, 6, 5, 4, 3, 2)
# Fields of a size of which, or of a rank in their place, one is given.
SIZES = ("keep", "params", "bytes", "fit", "max_loss", "max_kl")
# What a device is to hold: a model that answers, or one that is trained whole.
INFERENCE, TRAINING = USES = ("inference", "training")


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
        if text is not None and (isinstance(text, bool) or not isinstance(text, Real)):
            raise InputError(f"{asked('params', text)} is not a number of parameters; write 1400000000, 1400M or 1.4B")
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.strip().replace("_", "").replace(",", ""), re.IGNORECASE)
    if not match:
        raise InputError(f"{asked('params', text)} is not a number of parameters; write 1400000000, 1400M or 1.4B")
    return round(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2].upper()])


def parse_bytes(given: str | float | None) -> float | int | None:
    """A share of the targets' 16-bit bytes, ``0.35``, or the bytes of all weight files, ``90MB``; a float and an int.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(given, str):
        if given is not None and (isinstance(given, bool) or not isinstance(given, Real)):
            raise InputError(f"{asked('bytes', given)} is not a number; write 0.35, 90MB or 4GB")
        return float(given) if given is not None and not isinstance(given, Integral) else given
    try:
        return float(given) if "." in given or given.strip() in ("0", "1") else _byte_count(given)
    except ValueError:
        return _byte_count(given)


def _byte_count(text: str) -> int:
    count = byte_count(text)
    if count is None:
        raise InputError(f"{asked('bytes', text)} is neither a share nor a size; write 0.35, 90MB or 4GB")
    return count


def parse_memory(given: str | int | None) -> int | None:
    """Bytes of a device: ``8GB``, or a whole number.

    Raises:
        InputError: it is no size.
    """
    if given is None:
        return None
    count = byte_count(given) if isinstance(given, str) else whole("fit", given)
    if count is None:
        raise InputError(f"{asked('fit', given)} is not a size; write 8GB or 24GiB")
    return count


def parse_widths(given: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """``16,8,4`` -> ``(16, 8, 4)``, the widest first.

    Raises:
        InputError: it is no list of widths.
    """
    if given is None:
        return None
    words = given.split(",") if isinstance(given, str) else given
    try:
        widths = sorted({int(word) if isinstance(word, str) else index(word) for word in words}, reverse=True)
    except (TypeError, ValueError):
        raise InputError(f"{asked('widths', given)} is not a list of widths; write for example 16,8,4") from None
    wrong = [width for width in widths if width not in WIDTHS]
    if wrong or not widths:
        known = ", ".join(map(str, WIDTHS))
        raise InputError(f"{asked('widths', given)} names widths that weights cannot be stored in; choose of {known}")
    return tuple(widths)


def _written_widths(widths: Sequence[int]) -> list[str]:
    return [",".join(map(str, widths))]


def _written_memory(given: int) -> list[str]:
    return [size_text(given)]


def _written_bytes(given: float) -> list[str]:
    return [size_text(given) if isinstance(given, int) else repr(given)]


def default_and_patterns(rank: int | Mapping[str, int] | None) -> tuple[int | None, dict[str, int]]:
    """The rank of all targets, and those of patterns, as :func:`svdconvert.convert` takes both in one.

    Raises:
        InputError: a rank is not a whole number.
    """
    if not isinstance(rank, Mapping):
        return None if rank is None else whole("rank", rank), {}
    if not all(isinstance(pattern, str) for pattern in rank):
        raise InputError(f"{asked('rank', dict(rank))} has a pattern that is not text; write it in quotes")
    patterns = {pattern: whole("rank", one, {pattern: one}) for pattern, one in rank.items()}
    return patterns.pop("*", None), patterns


@dataclass(frozen=True)
class Size:
    """Exactly one of a rank (with exceptions), a kept fraction, the size of the model, or what it may lose.

    The size of the model is a number of parameters, or of bytes, which are spent on ranks and on bits. A device that it
    is to fit makes it one of both (``planning/fit.py``).

    Attributes:
        rank: rank of every target that no pattern names.
        patterns: pattern -> rank; the last match wins.
        keep: fraction of the target parameters to keep, 0 < keep < 1.
        params: parameters that the whole converted model may have.
        bytes: a fraction of the bytes that the targets take in 16 bits, or, a whole number, those of all weight files.
        widths: bits that a weight may be stored in where bytes are given, None for :data:`USUAL_WIDTHS`; beside a rank,
            a fraction or parameters the one width of every target, None for the model's own type.
        fit: bytes of a device's memory, which the largest result that fits it is to have; ``bytes`` or ``params`` say
            what is left for that once the model is known.
        fit_context: tokens of the sequence that has to fit as well; None for what the model reads, at most 4,096.
        fit_for: row of :data:`USES`.
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
    bytes: float | None = option(
        None,
        "--bytes",
        "Instead: bytes, spent on rank and bits together: a share of what the targets take in 16 bits, 0.35, or the "
        "weight files' size, 90MB.",
        keyword="bytes",
        group="Size",
        metavar="SHARE|SIZE",
        read=parse_bytes,
        write=_written_bytes,
    )
    widths: Sequence[int] | None = option(
        None,
        "--widths",
        "Bits that --bytes may store a weight in; 16 is the model's own type. With --rank, --keep or --params: the one "
        "width that every target is stored in.",
        keyword="widths",
        group="Size",
        metavar="LIST",
        read=parse_widths,
        usual=",".join(map(str, USUAL_WIDTHS)),
        write=_written_widths,
    )
    fit: int | None = option(
        None,
        "--fit",
        "Instead: the largest result that fits so much memory of a device, 8GB say, as --bytes, or for training as "
        "--params; a tenth is left free.",
        keyword="fit",
        group="Size",
        metavar="SIZE",
        read=parse_memory,
        write=_written_memory,
    )
    fit_context: int | None = option(
        None,
        "--fit-context",
        "Tokens of the one sequence that --fit counts, with its cache of keys and values, or its activations.",
        keyword="fit_context",
        group="Size",
        kind="count",
        usual="the model's longest, at most 4096",
    )
    fit_for: str = option(
        INFERENCE,
        "--fit-for",
        "What has to fit: a model that answers, or one that is fine-tuned whole by AdamW in float32.",
        keyword="fit_for",
        group="Size",
        kind="choice",
        words=USES,
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
        given_sizes = [name for name in SIZES if getattr(self, name) is not None]
        if len(given_sizes) + (self.rank is not None or bool(self.patterns)) != 1:
            *words, last = (asked(name) for name in ("rank", *SIZES))
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
        self._check_fit()
        self._check_bytes()
        if self.limit is not None:
            name, nats = self.limit
            if not 0 < nats < math.inf:
                raise InputError(f"{asked(name, nats)} must be above 0 and finite (nats per token)")

    def _check_fit(self) -> None:
        """Refuse a device that cannot be, and what would have no effect without one."""
        if self.fit_for not in USES:
            raise InputError(f"{asked('fit_for', self.fit_for)} is unknown; choose {' or '.join(USES)}")
        if self.fit is None:
            for name, given in (("fit_context", self.fit_context is not None), ("fit_for", self.fit_for != INFERENCE)):
                if given:
                    words = asked(name, getattr(self, name))
                    raise InputError(f"{words} has no effect without {asked('fit')}; give the memory as well")
        elif self.fit < 1000:
            raise InputError(f"{asked('fit', self.fit)} is too small for a device; write a size such as 8GB")

    def _check_bytes(self) -> None:
        """Refuse bytes that cannot be, and what would have no effect beside or without them."""
        if not self.in_bytes:
            self._check_width()
            return
        if self.bytes is not None and not (0 < self.bytes < 1 if isinstance(self.bytes, float) else self.bytes >= 1000):
            raise InputError(
                f"{asked('bytes', self.bytes)} must lie between 0 and 1 (a share of the targets' 16-bit bytes), or be "
                "a size such as 90MB"
            )
        if self.factor_all:
            raise InputError(
                f"{asked('factor_all', True)} does not go with {asked(self.given[0])}, which chooses ranks among those "
                "that save something; leave one of them out"
            )

    def _check_width(self) -> None:
        """Refuse widths beside a size that is not in bytes, unless it is one that all can be stored in."""
        if self.widths is None:
            return
        words, (name, value) = asked("widths", self.widths), self._chosen
        if self.fit is not None:
            raise InputError(
                f"{words} does not go with {asked('fit_for', TRAINING)}, since weights of few bits are not trained "
                "whole; leave one of them out"
            )
        if self.limit is not None:
            raise InputError(
                f"{words} does not go with {asked(name, value)}, which is kept by what is measured before anything is "
                f"rounded; give the size that it leads to as {asked('keep')}"
            )
        if len(self.widths) > 1:
            raise InputError(
                f"{words} leaves a choice, which {asked('bytes')} makes; beside {asked(name, value)} give one width"
            )
        if self.width == WIDTHS[0]:
            raise InputError(
                f"{words} has no effect beside {asked(name, value)}: it is the model's own type; leave it out"
            )

    @property
    def _chosen(self) -> tuple[str, object]:
        """The one size that is given, and what it says."""
        if self.rank is not None or self.patterns:
            return "rank", self.patterns or self.rank
        return next((name, one) for name in SIZES if (one := getattr(self, name)) is not None)

    @property
    def width(self) -> int | None:
        """The one width of all targets, where that is asked for beside their ranks or parameters."""
        return self.widths[0] if self.widths is not None and not self.in_bytes else None

    @property
    def rounds(self) -> bool:
        """Whether weights are stored in few bits."""
        return self.in_bytes or self.width is not None

    @property
    def rounded_by(self) -> tuple[str, object]:
        """The field that few bits come of, and what it says, for messages."""
        return self.given if self.in_bytes else ("widths", self.widths)

    @property
    def in_bytes(self) -> bool:
        """Whether bytes are spent on ranks and bits, also where it is not known yet how many there are."""
        return self.bytes is not None or (self.fit is not None and self.fit_for == INFERENCE)

    @property
    def given(self) -> tuple[str, object]:
        """The field that bytes or parameters come of, and what it says, for messages."""
        if self.fit is not None:
            return "fit", self.fit
        return ("params", self.params) if self.bytes is None else ("bytes", self.bytes)

    @property
    def as_asked(self) -> Size:
        """The size without what was worked out to fit a device."""
        return self if self.fit is None else replace(self, bytes=None, params=None)

    @property
    def chosen_widths(self) -> Sequence[int]:
        """The widths, the widest first."""
        return USUAL_WIDTHS if self.widths is None else self.widths

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

        What it may lose is left out where it is not limited, and bytes, widths and devices where there are none, as in
        the records of earlier versions.
        """
        return {
            "rank": self.rank,
            "rank_patterns": dict(self.patterns),
            "keep": self.keep,
            "params": self.params,
            "factor_all": self.factor_all,
            "rank_multiple": self.multiple,
            **dict([self.limit] if self.limit is not None else []),
            **({} if self.bytes is None else {"bytes": self.bytes}),
            **({"widths": list(self.chosen_widths)} if self.bytes is not None or self.width is not None else {}),
            **({} if self.fit is None else {name: getattr(self, name) for name in ("fit", "fit_context", "fit_for")}),
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

    def target_bytes(self, target_params: int, other_bytes: int) -> int | None:
        """Bytes that the target weights may take together; None where the size is not given in bytes.

        Args:
            target_params: parameters of all targets.
            other_bytes: bytes of everything else in the weight files.
        """
        if self.bytes is None:
            return None
        return int(self.bytes * 2 * target_params) if isinstance(self.bytes, float) else int(self.bytes) - other_bytes
