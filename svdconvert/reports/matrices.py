"""Every matrix in a table: all that the maps show, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from svdconvert.names import natural
from svdconvert.reports import figures
from svdconvert.reports.facts import LONGEST_NAME, Facts
from svdconvert.reports.markup import Child, Markup, element
from svdconvert.reports.tables import scrolling, section, simple_table

# More are in the record alone.
MOST_MATRICES = 10_000

# Field of a report, and its heading; columns that no matrix has are left out.
_COLUMNS = {
    "relative_error": "weights",
    "output_error": "outputs",
    "predicted_loss": "predicted loss",
    "seconds": "time",
}


def matrix_section(facts: Facts) -> Markup | None:
    """The table; None where there are no matrices."""
    if not facts.matrices:
        return None
    columns = {field: write for field in _COLUMNS if (write := _written(facts, field)) is not None}
    shared = any(matrix.shared_with for matrix in facts.matrices.values())
    modules = sorted({**facts.matrices, **facts.dense}, key=lambda name: natural(name[:LONGEST_NAME]))
    rows: list[Sequence[Child]] = []
    for module in modules[:MOST_MATRICES]:
        matrix = facts.matrices.get(module)
        if matrix is None:
            rows.append([module, "", "dense", "", *([""] * (len(columns) + shared))])
            continue
        rows.append(
            [
                module,
                f"{matrix.shape[0]} x {matrix.shape[1]}",
                figures.count(matrix.rank),
                figures.share(facts.kept(module) or 0.0, 1),
                *("" if (n := getattr(matrix, field)) is None else write(n) for field, write in columns.items()),
                *([matrix.shared_with or ""] if shared else []),
            ]
        )
    heads: list[Child] = ["matrix", "shape", "rank", "kept", *(_COLUMNS[field] for field in columns)]
    heads += ["shares the factor of"] if shared else []
    caption = "Shape, rank, share of the parameters kept, and what was lost"
    left_out = len(modules) - MOST_MATRICES
    note = element("p", f"{left_out:,} more are in svdconvert.json.", class_="note") if left_out > 0 else None
    table = scrolling(caption, simple_table(caption, heads, rows, aligned="tnnn" + "n" * len(columns) + "t"), tall=True)
    return section("matrices", "Every matrix", table, note)


def _written(facts: Facts, field: str) -> Callable[[float], str] | None:
    """How the numbers of a field are written; None where no matrix has one."""
    numbers = [getattr(matrix, field) for matrix in facts.matrices.values()]
    known = [number for number in numbers if number is not None]
    if not known:
        return None
    return figures.duration if field == "seconds" else figures.in_column(known)
