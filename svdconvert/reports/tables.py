"""What several parts of a page are made of: sections, tables, bars in their cells, and numbers in a row of tiles."""

from __future__ import annotations

import re
from collections.abc import Sequence

from svdconvert.reports.markup import Child, Markup, element

# A table by kind of matrix, or a list, ends here: no model has as many.
MOST_ROWS = 1000


def section(name: str, title: str, *children: Child) -> Markup:
    """A part of a page with its heading.

    Args:
        name: by which links lead to it.
        title: the heading.
        children: what follows.
    """
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *children, id=name, aria_labelledby=f"{name}-title")


def scrolling(label: str, *children: Child, tall: bool = False) -> Markup:
    """What may be wider than the screen, in a box that scrolls by itself and by the keyboard.

    Args:
        label: what it is, for screen readers.
        children: what is in it.
        tall: whether its height is limited too.
    """
    return element("div", *children, class_="box tall" if tall else "box", role="region", aria_label=label, tabindex=0)


def simple_table(caption: Child, heads: Sequence[Child], rows: Sequence[Sequence[Child]], aligned: str) -> Markup:
    """A table whose first column names the row.

    Args:
        caption: above it.
        heads: of the columns.
        rows: cells; those that are cells already are left as they are.
        aligned: a letter for each column, ``t`` for text and ``n`` for numbers.
    """
    kinds = [None if letter == "t" else "number" for letter in aligned]

    def cell(place: int, child: Child) -> Markup:
        if isinstance(child, Markup) and child.startswith("<td"):
            return child
        return element("td", child, class_=kinds[place]) if place else element("th", child, scope="row")

    top = [element("th", head, scope="col", class_=kinds[place]) for place, head in enumerate(heads)]
    body = [element("tr", [cell(place, child) for place, child in enumerate(row)]) for row in rows]
    return element("table", caption_of(caption), element("thead", element("tr", top)), element("tbody", body))


def caption_of(text: Child) -> Markup:
    """A caption that stays on the screen while its table scrolls."""
    return element("caption", element("span", text))


def broken(name: str) -> list[Child]:
    """A module's name with places where a line may end."""
    pieces = re.split(r"(?<=[._])", name)
    return [child for piece in pieces for child in (piece, element("wbr"))][:-1]


def bar(part: float, whole: float = 1.0, kind: str = "kept") -> Markup:
    """A bar inside a frame, in a cell of a table; the number stands beside it.

    Args:
        part, whole: lengths of the bar and of its frame, as shares of the cell's width.
        kind: names its colour.
    """
    frame, filled = (100 * min(max(value, 0.0), 1.0) for value in (whole, part))
    return element(
        "td",
        element(
            "svg",
            element("rect", class_="frame", width=f"{frame:.2f}", height=10),
            element("rect", class_=kind, width=f"{filled:.2f}", height=10),
            viewBox="0 0 100 10",
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        class_="bar",
    )


def tiles(rows: Sequence[tuple[str, str, str]]) -> Markup:
    """The numbers that matter most.

    Args:
        rows: name, number, and what else is to be said.
    """
    return element(
        "dl",
        [
            element("div", element("dt", name), element("dd", number, class_="figure"), element("dd", more))
            for name, number, more in rows
        ],
        class_="tiles",
    )


def hidden(text: str) -> Markup:
    """Read aloud, and not seen."""
    return element("span", text, class_="hidden")


def pairs(rows: Sequence[tuple[Child, Child]], *, short: bool = False) -> Markup:
    """Names and values.

    Args:
        rows: of each.
        short: whether they are so short that several stand side by side.
    """
    entries = [element("div", element("dt", name), element("dd", value)) for name, value in rows]
    return element("dl", entries, class_="pairs short" if short else "pairs")
