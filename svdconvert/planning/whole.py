"""The steps of a job over the language model of a model that sees, made those of a job over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from svdconvert.planning.steps import Step, in_order
from svdconvert.storage.source import Source


def whole_steps(source: Source, steps: Sequence[Step]) -> list[Step]:
    """Steps whose results have the names that they have in the whole model, and a copy of everything beside.

    Args:
        source: that is read.
        steps: of its language model; they are returned as they are where that is all.
    """
    whole = source.whole
    if whole is None:
        return list(steps)
    named = [
        replace(step, outputs=tuple(replace(info, name=whole.written(info.name)) for info in step.outputs))
        for step in steps
    ]
    beside = [
        Step("copy", name, (info,), (replace(info, name=name, file="", start=-1),)) for name, info in whole.rest.items()
    ]
    return in_order([*named, *beside])


def bytes_of(source: Source) -> int:
    """Bytes of all tensors of a checkpoint."""
    beside = () if source.whole is None else source.whole.rest.values()
    return sum(info.nbytes for info in (*source.tensors.values(), *beside))
