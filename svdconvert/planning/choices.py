"""Spending one budget of bytes over all matrices, on ranks and on bits.

Every matrix has a list of choices, each with its bytes and the loss that it adds: dense in its own type, dense on a
grid of few bits, or a product of some rank on one. Choosing one of each list within a sum of bytes is the
multiple-choice knapsack problem. The lower convex hulls of the lists are walked down together, the best gain per byte
first (Sinha and Zoltners, Operations Research 27, 1979), and what is left then buys single improvements. Of that, and
of the same begun at every even rounding that fits, the best is taken, so that the result is never worse, by the losses
of the lists, than all matrices dense at one width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from svdconvert.errors import InputError
from svdconvert.grids import Grid


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to store a matrix.

    Attributes:
        rank: of the product; None for a dense one.
        grids: as of :class:`svdconvert.planning.ranks.Target`; empty where no weight is rounded.
        nbytes: of its tensors.
        loss: that it adds, in nats per token or any other currency that all matrices share.
    """

    rank: int | None
    grids: tuple[Grid | None, ...]
    nbytes: int
    loss: float


class TooFewBytes(InputError):
    """A budget is below what the smallest choices take.

    Attributes:
        why: the sentence without what to do about it.
    """

    def __init__(self, budget: int, least: int) -> None:
        self.why = (
            f"a budget of {budget:,} bytes for the targets is too small, since their smallest choices take {least:,}"
        )
        super().__init__(f"{self.why}; give more bytes, or narrower widths")


def choose(lists: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice of each list, of little total loss within a budget.

    Args:
        lists: of every matrix, in any order.
        budget: bytes for all matrices together.

    Raises:
        TooFewBytes: the smallest choices together are above the budget.
    """
    ladders = [_worthwhile(choices) for choices in lists]
    least = sum(ladder[0].nbytes for ladder in ladders)
    if budget < least:
        raise TooFewBytes(budget, least)
    starts = [_down_the_hulls(ladders, budget), *_even_starts(lists, ladders, budget)]
    return min((_spend(ladders, start, budget) for start in starts), key=_total_loss)


def byte_price(lists: Sequence[Sequence[Choice]], budget: int) -> float:
    """What one more byte would save, in loss; infinite where not even the smallest choices fit.

    Args:
        lists, budget: see :func:`choose`.
    """
    hulls = [_hull(_worthwhile(choices)) for choices in lists]
    rest = budget - sum(hull[0].nbytes for hull in hulls)
    if rest < 0:
        return float("inf")
    steps = [(_gain(*pair), pair[1].nbytes - pair[0].nbytes) for hull in hulls for pair in pairwise(hull)]
    for gain, price in sorted(steps, key=lambda step: -step[0]):
        rest -= price
        if rest < 0:
            return gain
    return 0.0


def alike(choices: Sequence[Choice], bits: int) -> Choice:
    """The dense choice of a width that takes the fewest bytes; of the next wider one where there is none of it.

    Args:
        choices: of a matrix, its own type among them.
        bits: the width.
    """
    dense = [choice for choice in choices if choice.rank is None and _width(choice) >= bits]
    return min(dense, key=lambda choice: (_width(choice), choice.nbytes))


def evenly_rounded(lists: Sequence[Sequence[Choice]], budget: int) -> list[Choice] | None:
    """All matrices dense at one width, of the least loss within a budget; None where no width fits.

    Args:
        lists, budget: see :func:`choose`.
    """
    fitting = (even for even in _even(lists) if sum(choice.nbytes for choice in even) <= budget)
    return min(fitting, key=_total_loss, default=None)


def _total_loss(choices: Sequence[Choice]) -> float:
    return sum(choice.loss for choice in choices)


def _worthwhile(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other one matches in bytes and in loss, the smallest first; their losses fall strictly."""
    ladder: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.loss)):
        if not ladder or choice.loss < ladder[-1].loss:
            ladder.append(choice)
    return ladder


def _hull(ladder: Sequence[Choice]) -> list[Choice]:
    """Its lower convex hull."""
    hull: list[Choice] = []
    for choice in ladder:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(before: Choice, after: Choice) -> float:
    """Loss saved per byte."""
    return (before.loss - after.loss) / (after.nbytes - before.nbytes)


def _down_the_hulls(ladders: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """From the smallest choices on, the best gain per byte first; a matrix whose next step does not fit stays."""
    hulls = [_hull(ladder) for ladder in ladders]
    steps = [(-_gain(before, after), i, after) for i, hull in enumerate(hulls) for before, after in pairwise(hull)]
    picked, stopped = [hull[0] for hull in hulls], set()
    rest = budget - sum(choice.nbytes for choice in picked)
    for _, i, after in sorted(steps, key=lambda step: step[:2]):
        price = after.nbytes - picked[i].nbytes
        if i in stopped or price > rest:
            stopped.add(i)
            continue
        rest -= price
        picked[i] = after
    return picked


def _even(lists: Sequence[Sequence[Choice]]) -> Iterator[list[Choice]]:
    """All matrices dense at one width, for every width: with as few bytes, and with as little loss as there is.

    A matrix without that width has its next wider one.
    """
    dense = [[choice for choice in choices if choice.rank is None] for choices in lists]
    for width in {_width(choice) for choices in dense for choice in choices}:
        for key in (lambda choice: choice.nbytes, lambda choice: choice.loss):
            widths = [min((w for w in map(_width, choices) if w >= width), default=None) for choices in dense]
            if None in widths:
                continue
            yield [
                min((choice for choice in choices if _width(choice) == own), key=key)
                for own, choices in zip(widths, dense, strict=True)
            ]


def _width(choice: Choice) -> int:
    """Bits of a dense choice; its own type is wider than any grid."""
    return next((grid.bits for grid in choice.grids if grid is not None), 64)


def _even_starts(
    lists: Sequence[Sequence[Choice]], ladders: Sequence[Sequence[Choice]], budget: int
) -> list[list[Choice]]:
    """Even roundings within the budget, each matrix by the best choice that takes no more bytes."""
    found = []
    for even in _even(lists):
        if sum(choice.nbytes for choice in even) <= budget:
            best = [
                [rung for rung in ladder if rung.nbytes <= choice.nbytes][-1]
                for ladder, choice in zip(ladders, even, strict=True)
            ]
            found.append(best)
    return found


def _spend(ladders: Sequence[Sequence[Choice]], start: Sequence[Choice], budget: int) -> list[Choice]:
    """Buy improvements with the rest of the budget, the best gain per byte first, until none fits."""
    picked = list(start)
    rest = budget - sum(choice.nbytes for choice in picked)
    while True:
        best, gain = -1, 0.0
        better = picked[0]
        for i, ladder in enumerate(ladders):
            for choice in ladder:
                if picked[i].nbytes < choice.nbytes <= picked[i].nbytes + rest:
                    worth = _gain(picked[i], choice)
                    if worth > gain:
                        best, gain, better = i, worth, choice
        if best < 0:
            return picked
        rest -= better.nbytes - picked[best].nbytes
        picked[best] = better


def mixture_loss(choices: Sequence[Choice], nbytes: float) -> float:
    """The least loss of so many bytes on average, where several alike matrices may choose differently.

    Args:
        choices: of one matrix.
        nbytes: an average; infinite loss below the smallest choice, the least loss above the largest.
    """
    hull = _hull(_worthwhile(choices))
    if nbytes < hull[0].nbytes:
        return float("inf")
    for before, after in pairwise(hull):
        if nbytes < after.nbytes:
            return before.loss - _gain(before, after) * (nbytes - before.nbytes)
    return hull[-1].loss
