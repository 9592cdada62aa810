"""Which experts of a block are collected together, so that their sums fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from svdconvert.methods.statistics import Needs
from svdconvert.models.blocks import ModelBlocks
from svdconvert.names import expert, suffix
from svdconvert.planning import expert_groups


@dataclass(frozen=True)
class ExpertGroups:
    """The experts of a block whose sums do not fit together.

    Attributes:
        layers: those of the experts of each group.
        others: layers of the block that are no expert's.
        nbytes: of the sums of all experts.
    """

    layers: Sequence[Sequence[str]]
    others: Sequence[str]
    nbytes: int


def groups_of(blocks: ModelBlocks, index: int, modules: Sequence[str], needs: Needs) -> ExpertGroups | None:
    """The groups of a block; None if the sums of all its experts fit together.

    Args:
        blocks: the dense model.
        index: of the block.
        modules: its layers whose statistics are wanted.
        needs: what is collected.
    """
    layers: dict[str, list[str]] = {}
    for name in modules:
        layers.setdefault(expert(name), []).append(name)
    others = layers.pop("", [])
    if blocks.experts is None or not layers:
        return None
    own, sizes = blocks.experts.names[-1], []
    for names in layers.values():
        shapes = {name: blocks.sides(index, suffix(name)) for name in names}
        sums = expert_groups.sums_bytes(shapes, own, input_grams=needs.input_gram, output_grams=needs.output_gram)
        sizes.append(sums)
    bound, by_expert = expert_groups.bound_on(blocks.device.type), list(layers.values())
    if sum(sizes) <= bound:
        return None
    places = expert_groups.in_groups(sizes, bound)
    return ExpertGroups(
        [[name for place in group for name in by_expert[place]] for group in places], others, sum(sizes)
    )


def reads_by_expert(blocks: ModelBlocks, index: int) -> bool:
    """Whether a block's experts are too large to be in memory together."""
    return blocks.device.type == "cpu" and blocks.expert_bytes(index) > expert_groups.WEIGHTS_ON_CPU
