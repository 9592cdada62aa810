"""Every matrix in a table: all that the maps show, as text."""

from __future__ import annotations

from collections.abc import Callable

from svdconvert.factoring.matrix_report import MatrixReport
from svdconvert.names import natural
from svdconvert.reports import figures
from svdconvert.reports.facts import LONGEST_NAME, Facts
from svdconvert.reports.markup import Child, Markup, element
from svdconvert.reports.tables import scrolling, section, simple_table

# More are in the record alone.
MOST_MATRICES = 10_000

# Field of a report, heading, how it is written; columns that no matrix has are left out.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("relative_error", "weights", figures.decimals),
    ("output_error", "outputs", figures.decimals),
    ("predicted_loss", "predicted loss", figures.decimals),
    ("seconds", "time", figures.duration),
)


def matrix_section(facts: Facts) -> Markup | None:
    """The table; None where there are no matrices."""
    if not facts.matrices:
        return None
    columns = [
        column
        for column in _COLUMNS
        if any(getattr(matrix, column[0]) is not None for matrix in facts.matrices.values())
    ]
    shared = any(matrix.shared_with for matrix in facts.matrices.values())
    modules = sorted({**facts.matrices, **facts.dense}, key=lambda name: natural(name[:LONGEST_NAME]))
    rows = []
    for module in modules[:MOST_MATRICES]:
        matrix = facts.matrices.get(module)
        if matrix is None:
            rows.append([module, "", "dense", "", *("" for _ in columns), *([""] if shared else [])])
            continue
        rows.append(
            [
                module,
                f"{matrix.shape[0]} x {matrix.shape[1]}",
                figures.count(matrix.rank),
                figures.share(facts.kept(module) or 0.0, 1),
                *(_cell(matrix, field, write) for field, _, write in columns),
                *([matrix.shared_with or ""] if shared else []),
            ]
        )
    heads: list[Child] = ["matrix", "shape", "rank", "kept", *(heading for _, heading, _ in columns)]
    heads += ["shares the factor of"] if shared else []
    caption = "Shape, rank, share of the parameters kept, and what was lost"
    left_out = len(modules) - MOST_MATRICES
    note = element("p", f"{left_out:,} more are in svdconvert.json.", class_="note") if left_out > 0 else None
    table = scrolling(caption, simple_table(caption, heads, rows, aligned="tnnn" + "n" * len(columns) + "t"), tall=True)
    return section("matrices", "Every matrix", table, note)


def _cell(matrix: MatrixReport, field: str, write: Callable[[float], str]) -> str:
    value = getattr(matrix, field)
    return "" if value is None else write(value)
