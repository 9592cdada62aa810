"""Every matrix in a table: all that the maps show, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport
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
    if not facts.changed:
        return None
    columns = {field: write for field in _COLUMNS if (write := _written(facts, field)) is not None}
    shared = any(matrix.shared_with for matrix in facts.matrices.values())
    modules = sorted({**facts.matrices, **facts.dense}, key=lambda name: natural(name[:LONGEST_NAME]))
    packed = facts.in_few_bits
    rows: list[Sequence[Child]] = []
    for module in modules[:MOST_MATRICES]:
        matrix = facts.matrices.get(module)
        if matrix is None:
            rows.append(
                [*_dense(facts, module, packed), *(_cells(facts.rounded.get(module), columns)), *([""] * shared)]
            )
            continue
        rows.append(
            [
                module,
                f"{matrix.shape[0]} x {matrix.shape[1]}",
                figures.count(matrix.rank),
                *([" + ".join(map(str, matrix.bits or ()))] if packed else []),
                figures.share(facts.kept(module) or 0.0, 1),
                *_cells(matrix, columns),
                *([matrix.shared_with or ""] if shared else []),
            ]
        )
    heads: list[Child] = [
        "matrix",
        "shape",
        "rank",
        *(["bits"] if packed else []),
        "kept",
        *(_COLUMNS[field] for field in columns),
    ]
    heads += ["shares the factor of"] if shared else []
    caption = "Shape, rank, share of the parameters kept, and what was lost"
    left_out = len(modules) - MOST_MATRICES
    note = element("p", f"{left_out:,} more are in svdconvert.json.", class_="note") if left_out > 0 else None
    table = scrolling(
        caption, simple_table(caption, heads, rows, aligned="tnnn" + "n" * (len(columns) + packed) + "t"), tall=True
    )
    return section("matrices", "Every matrix", table, note)


def _dense(facts: Facts, module: str, packed: bool) -> list[Child]:
    """Name, shape, rank, bits and share of a matrix that stayed dense."""
    known = facts.rounded.get(module)
    shape = "" if known is None else f"{known.shape[0]} x {known.shape[1]}"
    bits = "" if known is None else " + ".join(map(str, known.bits))
    return [module, shape, "dense", *([bits] if packed else []), ""]


def _cells(matrix: MatrixReport | RoundedReport | None, columns: Mapping[str, Callable[[float], str]]) -> list[Child]:
    return ["" if (n := getattr(matrix, field, None)) is None else write(n) for field, write in columns.items()]


def _written(facts: Facts, field: str) -> Callable[[float], str] | None:
    """How the numbers of a field are written; None where no matrix has one."""
    numbers = [getattr(one, field, None) for one in facts.changed.values()]
    known = [number for number in numbers if number is not None]
    if not known:
        return None
    return figures.duration if field == "seconds" else figures.in_column(known)
