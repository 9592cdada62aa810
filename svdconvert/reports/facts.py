"""What a page tells of a result: the fields of its record, checked, and the matrices in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport
from svdconvert.fields import COUNT, NUMBER, OBJECT, TEXT, Kind, either, few, many, optional, record, require, table
from svdconvert.jobs.record import ANEW, Record
from svdconvert.layouts.table import DEFAULT_LAYOUT, LAYOUTS
from svdconvert.methods.table import METHODS, Method
from svdconvert.names import kind, layer_number, suffix

# Names of more than this many characters are nobody's layers.
LONGEST_NAME = 300

_SIZE = record({"before": COUNT, "after": COUNT})
_MATRIX = record(
    {
        "rank": COUNT,
        "shape": few(COUNT, 2, 2),
        "relative_error": NUMBER,
        "output_error": optional(NUMBER),
        "predicted_loss": optional(NUMBER),
        "seconds": optional(NUMBER),
        "precision": optional(TEXT),
        "shared_with": optional(TEXT),
        "bits": optional(many(COUNT)),
        "groups": optional(many(COUNT)),
    }
)
_ROUNDED = record(
    {
        "shape": few(COUNT, 2, 2),
        "bits": many(COUNT),
        "groups": many(COUNT),
        "relative_error": NUMBER,
        "whole": optional(NUMBER),
        "lost": optional(NUMBER),
        "predicted_loss": optional(NUMBER),
        "seconds": optional(NUMBER),
    }
)
_FIELDS: Mapping[str, Kind] = {
    "versions": optional(table(TEXT)),
    "source": record({"name": TEXT, "repo": optional(TEXT), "commit": optional(TEXT)}),
    "settings": record(
        {
            "method": optional(TEXT),
            "layout": optional(Kind("a layout", lambda value: value in list(LAYOUTS))),
            "tokens": optional(COUNT),
        }
    ),
    "bytes": optional(_SIZE),
    "kinds": optional(table(record({"matrices": COUNT, "params": _SIZE, "bytes": _SIZE}))),
    "dense_targets": optional(table(TEXT)),
    "notes": optional(many(TEXT)),
    "matrices": optional(either(COUNT, table(_MATRIX))),
    "rounded": optional(table(_ROUNDED)),
    "folded": optional(many(TEXT)),
    "refit": optional(OBJECT),
    "healing": optional(OBJECT),
    "repeat": optional(TEXT),
}


@dataclass(frozen=True)
class Change:
    """A number before and after."""

    before: int
    after: int


@dataclass(frozen=True)
class KindSize:
    """Matrices of one kind.

    Attributes:
        matrices: how many.
        params: of all of them.
        bytes: of all of them; None in a record of an earlier version.
    """

    matrices: int
    params: Change
    bytes: Change | None


@dataclass(frozen=True)
class Facts:
    """What is known of a result.

    Attributes:
        record: its svdconvert.json.
        params: parameters; ``before`` is None for a densified or folded model.
        bytes: of the weight files; None in an early record, and for a densified or folded model.
        matrices: module path -> what became of a factored matrix.
        dense: module path -> why a target stayed dense, or in how many bits.
        rounded: module path -> what became of a matrix that stayed dense, in few bits.
        kinds: suffix of module paths -> sizes.
        method: that truncated, or None.
    """

    record: Record
    params: tuple[int | None, int]
    bytes: Change | None
    matrices: Mapping[str, MatrixReport]
    dense: Mapping[str, str]
    rounded: Mapping[str, RoundedReport]
    kinds: Mapping[str, KindSize]
    method: Method | None

    @classmethod
    def of(cls, record: Record, where: object) -> Facts:
        """Those of a record.

        Args:
            record: of any version.
            where: its file, for messages.

        Raises:
            InputError: a field is of another kind than it should be.
        """
        told = record.to_json()
        require(told, _FIELDS, where, ANEW)
        results, size = record.results, record.results["params"]
        listed = results.get("matrices")
        matrices = (
            {name: MatrixReport.from_json(matrix) for name, matrix in listed.items()}
            if isinstance(listed, Mapping)
            else {}
        )
        rounded = {name: RoundedReport.from_json(one) for name, one in (results.get("rounded") or {}).items()}
        facts = cls(
            record=record,
            params=(size["before"], size["after"]) if isinstance(size, Mapping) else (None, size),
            bytes=_change(results.get("bytes")),
            matrices=matrices,
            dense={
                **(results.get("dense_targets") or {}),
                **{name: in_bits(one.bits) for name, one in rounded.items()},
            },
            rounded=rounded,
            kinds={},
            method=METHODS.get(record.settings.get("method") or ""),
        )
        return replace(facts, kinds=_kinds(results.get("kinds")) or facts.counted)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the result depends on."""
        return self.record.settings

    def number(self, name: str) -> float | None:
        """A number of the record, a loss say; None where it has none."""
        value: Any = self.record.results.get(name)
        return float(value) if NUMBER.fits(value) else None

    @cached_property
    def changed(self) -> Mapping[str, MatrixReport | RoundedReport]:
        """Module path -> what became of a matrix that was factored, rounded to few bits, or both."""
        return {**self.matrices, **self.rounded}

    @cached_property
    def in_few_bits(self) -> bool:
        """Whether any weight is stored in few bits."""
        return any(matrix.bits for matrix in self.changed.values())

    @cached_property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Module path of each matrix that holds a factor of its own -> all that use it, itself the first."""
        groups: dict[str, list[str]] = {}
        for module, matrix in self.matrices.items():
            if matrix.shared_with is None or matrix.shared_with not in self.matrices:
                groups.setdefault(module, []).insert(0, module)
            else:
                groups.setdefault(matrix.shared_with, []).append(module)
        return groups

    @cached_property
    def stored(self) -> Mapping[str, tuple[int, int]]:
        """Module path of a factored matrix -> parameters before and after; of those that share, of all of them."""
        layout = LAYOUTS[self.settings.get("layout") or DEFAULT_LAYOUT.name]
        found = {}
        for modules in self.groups.values():
            first = self.matrices[modules[0]]
            rows, columns = sum(self.matrices[name].shape[0] for name in modules), first.shape[1]
            sizes = (rows * columns, layout.cost(first.rank, (rows, columns)))
            found.update(dict.fromkeys(modules, sizes))
        return found

    def kept(self, module: str) -> float | None:
        """Share of a matrix's parameters that is stored; of those that share a factor, of all of them."""
        before, after = self.stored[module]
        return after / before if before > 0 else None

    @cached_property
    def ranks(self) -> Mapping[str, Sequence[int]]:
        """Kind of matrix -> ranks of the factored ones."""
        found: dict[str, list[int]] = {}
        for module, matrix in self.matrices.items():
            found.setdefault(kind_of(module), []).append(matrix.rank)
        return found

    @property
    def counted(self) -> dict[str, KindSize]:
        """Sizes by kind, counted from the factored matrices; for records that do not have them."""
        kinds: dict[str, KindSize] = {}
        for owner, modules in self.groups.items():
            before, after = self.stored[owner]
            old = kinds.get(kind_of(owner), KindSize(0, Change(0, 0), None))
            params = Change(old.params.before + before, old.params.after + after)
            kinds[kind_of(owner)] = KindSize(old.matrices + len(modules), params, None)
        return kinds


def in_bits(bits: Sequence[int]) -> str:
    """``4 bits``, ``8 and 4 bits``."""
    return f"{' and '.join(map(str, dict.fromkeys(bits)))} bits"


def kind_of(module: str) -> str:
    """The kind of a matrix: what its module path ends in."""
    return kind(module) if len(module) <= LONGEST_NAME else module


def path_of(module: str) -> str:
    """The path of a matrix in its layer, which of experts has the number of the expert."""
    return suffix(module) if len(module) <= LONGEST_NAME else module


def layer_of(module: str) -> int | None:
    """The number of a matrix's layer; None outside of layers."""
    number = layer_number(module) if len(module) <= LONGEST_NAME else -1
    return number if number >= 0 else None


def _change(told: Mapping[str, int] | None) -> Change | None:
    return None if told is None else Change(told["before"], told["after"])


def _kinds(told: Mapping[str, Any] | None) -> dict[str, KindSize]:
    """Sizes by kind as the record has them."""
    return {
        name: KindSize(one["matrices"], Change(**_only(one["params"])), Change(**_only(one["bytes"])))
        for name, one in (told or {}).items()
    }


def _only(told: Mapping[str, int]) -> dict[str, int]:
    return {name: told[name] for name in ("before", "after")}
