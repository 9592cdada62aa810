"""Sizes before and after, by kind of matrix."""

from __future__ import annotations

from collections.abc import Sequence

from svdconvert.reports import figures
from svdconvert.reports.facts import Change, Facts
from svdconvert.reports.markup import Child, Markup, element
from svdconvert.reports.tables import MOST_ROWS, bar, hidden, scrolling, section, simple_table


def size_section(facts: Facts) -> Markup | None:
    """The table; None where the sizes before are not known."""
    before, after = facts.params
    if before is None:
        return None
    whole, kinds = Change(before, after), list(facts.kinds.values())
    rest = _rest(whole, [kind.params for kind in kinds])
    nbytes = [kind.bytes for kind in kinds if kind.bytes is not None]
    with_bytes = facts.bytes is not None and len(nbytes) == len(kinds)
    rest_bytes = _rest(facts.bytes, nbytes) if facts.bytes is not None and with_bytes else None
    changes = [rest, *(kind.params for kind in kinds)]
    longest = max(1, *(max(change.before, change.after) for change in changes))
    rows: list[list[Child]] = [
        [
            name,
            *_cells(kind.params, longest),
            figures.count(kind.matrices),
            _ranks(facts.ranks.get(name, ()), kind.matrices),
            *_bytes(kind.bytes, with_bytes),
        ]
        for name, kind in list(facts.kinds.items())[:MOST_ROWS]
    ]
    rows.append(["everything else", *_cells(rest, longest), "", "", *_bytes(rest_bytes, with_bytes)])
    rows.append(["whole model", element("td"), *_numbers(whole), "", "", *_bytes(facts.bytes, with_bytes)])
    heads: list[Child] = ["kind", hidden("bars"), "kept", "before", "after", "matrices", "rank"]
    heads += ["bytes before", "bytes after"] if with_bytes else []
    caption = "Parameters by kind of matrix: the frame is before, the bar after"
    if facts.dense and not with_bytes:
        caption += "; matrices that stayed dense are under everything else"
    return section("sizes", "Sizes", scrolling(caption, simple_table(caption, heads, rows, aligned="ttnnnnnnn")))


def _ranks(ranks: Sequence[int], matrices: int) -> str:
    """``48``, ``42 to 49``, ``dense``, ``42 to 49, 1 dense``, of so many matrices."""
    if not ranks:
        return "dense"
    low, high = min(ranks), max(ranks)
    words = figures.count(low) if low == high else f"{figures.count(low)} to {figures.count(high)}"
    return f"{words}, {figures.count(matrices - len(ranks))} dense" if matrices > len(ranks) else words


def _rest(whole: Change, parts: Sequence[Change]) -> Change:
    """What is left of a whole."""
    return Change(whole.before - sum(part.before for part in parts), whole.after - sum(part.after for part in parts))


def _cells(change: Change, longest: int) -> list[Child]:
    return [bar(change.after / longest, change.before / longest), *_numbers(change)]


def _numbers(change: Change) -> list[Child]:
    share = figures.share(change.after, change.before)
    return [share, figures.count(change.before), figures.count(change.after)]


def _bytes(change: Change | None, with_bytes: bool) -> list[Child]:
    if not with_bytes or change is None:
        return ["", ""] if with_bytes else []
    return [figures.bytes_text(change.before), figures.bytes_text(change.after)]
