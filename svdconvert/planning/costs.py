"""What a planned model costs to run and to fine-tune, counted from shapes alone. No torch.

Multiplications are those of linear layers, one for each of their parameters and token; attention's own, which grow with
the text, are left out, since neither rank nor bits change them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from svdconvert.families.row import Architecture
from svdconvert.planning.plan import Plan
from svdconvert.storage.source import Source

# Linear layers of a block that are no targets, routers and the like, have weights of so many dimensions.
_MATRIX = 2
# Of the pieces before the first block, one that multiplies (OPT 350m).
_PROJECTION = "project_in"


@dataclass(frozen=True)
class Costs:
    """Of one token, and of training.

    Attributes:
        prompt: multiplications for a token of a prompt; the head sees the last one alone.
        answer: for a token of the answer, with the head.
        read_bytes: bytes of weights that are read for a token of the answer, as they are stored.
        training_bytes: memory of full fine-tuning with AdamW, without activations; None where weights are on grids,
            beside which adapters alone are trained.
    """

    prompt: int
    answer: int
    read_bytes: int
    training_bytes: int | None


def costs_of(source: Source, row: Architecture, plan: Plan) -> Costs:
    """Those of a plan.

    Args:
        source: the dense model.
        row: its architecture.
        plan: of single matrices with any ranks and grids.
    """
    shapes = row.parameters(source.config)
    pieces = [f"{row.prefix}{name}.weight" for name in row.pieces.embeddings if not name.endswith(_PROJECTION)]
    tables = {name for name in pieces if len(shapes.get(name, ())) == _MATRIX}  # not norms
    targets = {row.full_name(target.weight) for target in plan.targets}
    others = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == _MATRIX and name not in {*tables, *targets, row.head[0]}
    )
    prompt = others + sum(target.params for target in plan.targets)
    head = math.prod(shapes[row.embedding])
    looked_up = tables - ({row.embedding} if row.is_tied(source.config) else set())
    return Costs(
        prompt, prompt + head, _read(source, row, plan, looked_up), None if plan.grids else plan.training_bytes[1]
    )


def _read(source: Source, row: Architecture, plan: Plan, looked_up: Collection[str]) -> int:
    """Bytes of weights that are read for a token of the answer: none of those that a model sees with."""
    total = 0
    for info in (info for step in plan.steps for info in step.outputs):
        own = info.name if source.whole is None else source.whole.own(info.name)
        if own is not None and row.full_name(own) not in looked_up:
            total += info.nbytes
    return total
