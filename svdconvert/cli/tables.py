"""Tables that show every number in full, on any width of terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from svdconvert.sentences import printable

_GAP = 2


class PlainConsole(Console):
    """A console on which names from files are only text: they neither control the terminal nor become pictures."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does it, after what does not print is spelled out."""
        return super().render_str("\n".join(printable(line, None) for line in text.split("\n")), **options)


class _PlainTable(Table):
    """A table whose cells are no markup."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add one, of texts."""
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def new_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """An empty table without lines: the columns that name a row, to the left, and those of numbers, to the right."""
    table = _PlainTable(box=None, pad_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def show_table(console: Console, table: Table, keys: Sequence[int] = (0,)) -> None:
    """Print a table; where it is wider than the terminal, in pieces one below the other.

    Args:
        console: where to.
        table: its cells are plain text.
        keys: numbers of the columns that name a row; every piece begins with them.
    """
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
        return
    for number, columns in enumerate(_pieces(table.columns, keys, console.width)):
        if number:
            console.print()
        # Where names and one number do not fit side by side, cells are wrapped, never cut.
        fits = _width(columns) <= console.width
        piece = Table(box=None, pad_edge=False)
        for column in columns:
            piece.add_column(column.header, justify=column.justify, no_wrap=fits, overflow="fold")
        for cells in zip(*(column.cells for column in columns), strict=True):
            piece.add_row(*cells)
        console.print(piece)


def _pieces(columns: Sequence[Column], keys: Sequence[int], width: int) -> list[list[Column]]:
    """Columns of each piece."""
    names, pieces = [columns[key] for key in keys], list[list[Column]]()
    for column in (column for number, column in enumerate(columns) if number not in keys):
        if pieces and _width([*pieces[-1], column]) <= width:
            pieces[-1].append(column)
        else:
            pieces.append([*names, column])
    return pieces


def _width(columns: Sequence[Column]) -> int:
    widths = [max(cell_len(str(text)) for text in (column.header, *column.cells)) for column in columns]
    return sum(widths) + _GAP * (len(widths) - 1)


def show_pairs(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    table = _PlainTable(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
