"""Which grids and ranks a matrix may be stored with, and what each takes. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from svdconvert.errors import InputError
from svdconvert.grids import Grid
from svdconvert.planning.choices import Choice
from svdconvert.planning.fit import enough
from svdconvert.planning.ranks import Target
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.size import WIDTHS, Size
from svdconvert.storage.headers import file_layout
from svdconvert.storage.whole import Whole
from svdconvert.tensors import CODES, TensorInfo

# A width that is no grid: the model's own type. And those that are.
OWN, *GRIDS = WIDTHS
# Neighbouring inputs that share a scale, 0 for all of a row, by the width: scales cost bytes, and save the more of the
# loss the fewer bits there are (docs/choose-a-size.md).
GROUPS: Mapping[int, Sequence[int]] = {8: (0,), 7: (0,), 6: (0, 64), 5: (64, 32), 4: (64, 32), 3: (64, 32), 2: (64, 32)}
# Ranks are multiples of the first of these of which a matrix has at least so many: of a group, so that the output-side
# factor has whole groups, or of few where matrices are small.
MULTIPLES, LEAST_STEPS = (64, 32, 16, 8, 4), 8
WHOLE = "kept whole by the budget"
# Ranks of a list, from one to break-even.
RANKS = 12


def grids_of(bits: int, columns: int) -> list[Grid]:
    """The grids of a width for rows of so many inputs, of the fewest scales first."""
    fitting = {
        next((g for g in (group, 32, 16) if g <= group and columns % g == 0), 0) if group else 0: None
        for group in GROUPS[bits]
    }
    return [Grid(bits, group) for group in fitting]


def dense_ways(target: Target, widths: Sequence[int]) -> list[Target]:
    """A single matrix dense at some widths, from many bytes to few."""
    ways = []
    for bits in widths:
        if bits == OWN:
            ways.append(replace(target, rank=None, grids=(), reason=WHOLE))
            continue
        grids = reversed(grids_of(bits, target.shape[1]))
        ways += [replace(target, rank=None, grids=(grid,), reason="") for grid in grids]
    return ways


def product_on(target: Target, rank: int, bits: int) -> Target:
    """A single matrix as a product at a width."""
    shapes = target.layout.weights(rank, target.shape).values()
    grids = () if bits == OWN else tuple(grids_of(bits, columns)[-1] for _, columns in shapes)
    return replace(target, rank=rank, grids=grids, reason="")


def product_ways(target: Target, widths: Sequence[int], multiple: int) -> list[Target]:
    """A single matrix as products of some ranks, all multiples of a number, at some widths."""
    return [product_on(target, rank, bits) for bits in widths for rank in ranks_to_try(target, multiple)]


def at_one_width(targets: Sequence[Target], size: Size) -> list[Target]:
    """Targets whose ranks are chosen, all at the width that a size asks for beside them, if it asks for one.

    Those that stay dense are rounded as well.

    Args:
        targets: single matrices where there is a width.
        size: what is asked for.
    """
    if size.width is None:
        return list(targets)
    return [
        dense_ways(target, [size.width])[0] if target.rank is None else product_on(target, target.rank, size.width)
        for target in targets
    ]


def as_chosen(target: Target, choice: Choice) -> Target:
    """A target as a choice stores it."""
    reason = "" if choice.rank is not None or choice.grids else WHOLE
    return replace(target, rank=choice.rank, grids=choice.grids, reason=reason)


def stored_bytes(target: Target, code: str) -> int:
    """Bytes of the tensors that take the place of a target's weight.

    Args:
        target: a single matrix.
        code: safetensors' code of the type of weights and scales.
    """
    return sum(info.nbytes for info in target.tensors("weight", code))


def types_of(targets: Sequence[Target], tensors: Mapping[str, TensorInfo], request: Conversion) -> list[str]:
    """safetensors' code of the type that each target's weights, or their scales, are stored in."""
    kept = request.output.dtype == "keep"
    return [tensors[target.weight].dtype if kept else CODES[request.output.dtype] for target in targets]


def beside_targets(
    targets: Sequence[Target], tensors: Mapping[str, TensorInfo], request: Conversion, whole: Whole | None
) -> int:
    """Bytes of weight files beside the target weights: all other tensors, and headers at their longest.

    Args:
        targets: single matrices.
        tensors: of the model, as the targets name them.
        request: says the type.
        whole: the model that sees whose language model it is, if it is one.
    """
    weights, dtype = {target.weight for target in targets}, request.output.dtype
    others = [
        replace(info, dtype=info.dtype if dtype == "keep" else CODES[dtype])
        for name, info in tensors.items()
        if name not in weights
    ]
    codes = types_of(targets, tensors, request)
    longest = [
        info
        for target, code in zip(targets, codes, strict=True)
        for info in product_on(target, 1, GRIDS[0]).tensors(target.weight, code)
    ]
    every = [*others, *longest]
    if whole is not None:
        beside = whole.rest.values()
        every = [*(replace(info, name=whole.written(info.name)) for info in every), *beside]
        others += beside
    header = file_layout(every).size - sum(info.nbytes for info in every)
    return sum(info.nbytes for info in others) + header


def ranks_to_try(target: Target, multiple: int) -> list[int]:
    """Some ranks from low to the highest that saves parameters, ascending.

    Args:
        target: a single matrix.
        multiple: that every rank has to be one of; there may be none.
    """
    highest = target.layout.highest_rank(target.shape, target.dense_params - 1)
    usual = (math.lcm(multiple, m) for m in MULTIPLES)
    step = next((m for m in usual if highest // m >= LEAST_STEPS), multiple)
    count = highest // step
    steps = sorted({max(1, round(count * (i + 1) / RANKS)) for i in range(min(RANKS, count))})
    return [step * count for count in steps]


def evenly(targets: Sequence[Target], size: Size, codes: Sequence[str], budget: int) -> list[Target]:
    """What can be said before a text is read: all matrices dense at the widest width that fits, or else at the
    narrowest one with ranks that are an even share.

    Args:
        targets: single matrices.
        size: the widths to choose from.
        codes: of each target, the type of weights and scales.
        budget: bytes for all of them.

    Raises:
        InputError: the budget is below what the lowest ranks take, or no rank is a multiple of what was asked for.
    """

    def total(found: Sequence[Target]) -> int:
        return sum(stored_bytes(target, code) for target, code in zip(found, codes, strict=True))

    ladders = [ranks_to_try(target, size.multiple) for target in targets]
    if size.multiple > 1 and not any(ladders):
        raise InputError(
            f"{asked('rank_multiple', size.multiple)} leaves no rank that saves anything in any matrix; give a smaller "
            "one, or leave it out"
        )
    for place in range(len(dense_ways(targets[0], size.chosen_widths))):
        found = [
            ways[min(place, len(ways) - 1)] for ways in (dense_ways(target, size.chosen_widths) for target in targets)
        ]
        if total(found) <= budget:
            return found
    narrow = size.chosen_widths[-1]
    for share in range(RANKS, 0, -1):
        found = [
            product_on(target, ranks[max(0, len(ranks) * share // RANKS - 1)], narrow) if ranks else dense
            for target, ranks, dense in zip(targets, ladders, found, strict=True)
        ]
        if total(found) <= budget:
            return found
    least = total(found)
    raise InputError(
        f"{asked(*size.given)} leaves {budget:,} bytes for the targets, and at {narrow} bits and the lowest "
        f"ranks that are tried they take {least:,}; "
        + ("give more bytes" if size.fit is None else f"give more memory, {enough(size.fit, least - budget)} at least")
    )


def least_bytes(targets: Sequence[Target], size: Size, codes: Sequence[str]) -> int:
    """Bytes of all matrices at the narrowest width and the lowest ranks that are tried.

    Args:
        targets, size, codes: see :func:`evenly`.
    """
    found = 0
    for target, code in zip(targets, codes, strict=True):
        ranks, narrow = ranks_to_try(target, size.multiple), size.chosen_widths[-1]
        lowest = product_on(target, ranks[0], narrow) if ranks else dense_ways(target, [narrow])[-1]
        found += stored_bytes(lowest, code)
    return found
