"""A few families that take every way through the code that all of them share.

What a row says of itself is tested in every family. What code does for all rows alike is tested in those of ``FEW``:
every way that templates and rooms go by a field of a row is gone by one of them, and a new row with a field of a new
kind joins them by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import pytest

from support.families import FAMILIES
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS

# Fields that are names, sizes and words, in which any two rows differ and by which nothing branches.
_DATA = frozenset(
    "model_type stock text factored svd_model_type prefix targets shapes refused fields since title models remarks"
    " tiny llama_cpp blocks embeddings final writers sizes names count width field mixture router mixture_5 beside"
    " theta".split()
)
# Names by which code branches.
_NAMED = ("template", "logits", "causal")
# What the fields do not show: the plainest; a norm that adds 1 and a scaled embedding; a projected one; no rotation;
# experts in a part of another name; biases on some layers.
_FIRST = ("llama", "gemma3_text", "opt", "bloom", "mixtral", "qwen2")
# Blocks as unlike as can be: with a fused projection; stored the other way round; with norms behind layers and a tied
# head; of experts, with an MLP each and stacked; of a recurrence and experts; of a recurrence beside attention.
_UNLIKE = ("gpt_neox", "gpt2", "gemma2", "mixtral", "gpt_oss", "qwen3_next", "falcon_h1")


def ways(thing: Any, path: str = "") -> frozenset[tuple[str, object]]:
    """What code can tell two rows apart by: for each field that is not data, what kind of value it has."""
    found: set[tuple[str, object]] = set()
    for field in fields(thing):
        if field.name in _DATA:
            continue
        value, own = getattr(thing, field.name), f"{path}{field.name}"
        found.add((own, value if field.name in _NAMED else _kind(value, field.default)))
        if isinstance(value, Mapping):
            value = next(iter(value.values()), None)
        if is_dataclass(value):
            found |= ways(value, f"{own}.")
    return frozenset(found)


def _kind(value: object, default: object) -> object:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (str, tuple, Mapping)):
        return bool(value)
    if callable(value) and not is_dataclass(value):
        return default is not MISSING and value is not default
    return type(value).__name__


def representatives(rows: Mapping[str, Architecture]) -> list[str]:
    """Names of rows whose ways are those of all rows, in the order of the table."""
    found = {name: ways(row) for name, row in rows.items()}
    chosen = [name for name in _FIRST if name in rows]
    left = frozenset[tuple[str, object]]().union(*found.values())
    left -= frozenset[tuple[str, object]]().union(*(found[name] for name in chosen))
    while left:
        chosen.append(max(found, key=lambda name: len(found[name] & left)))
        left -= found[chosen[-1]]
    return [name for name in rows if name in chosen]


REPRESENTATIVES = representatives({name: ARCHITECTURES[name] for name in FAMILIES})
# A test of the fixture `row`, or of `pair`, of code that all rows share.
FEW = pytest.mark.parametrize("row", REPRESENTATIVES, indirect=True)
# A test of `row` of commands and of other packages, in which a row's blocks have a part, but no other field of it.
UNLIKE = pytest.mark.parametrize("row", [name for name in _UNLIKE if name in FAMILIES], indirect=True)
# A test of `pair` of what a row says, which has nothing to do with layouts; the shared code of both.
EACH_ONCE = pytest.mark.parametrize(
    ("row", "pair"),
    [(name, layout) for name in FAMILIES for layout in LAYOUTS if layout == "balanced" or name in REPRESENTATIVES],
    indirect=True,
)
