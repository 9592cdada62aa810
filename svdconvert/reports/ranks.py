"""Where the parameters went: the map of kept shares, with the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from svdconvert.reports import figures
from svdconvert.reports.facts import Facts, in_bits
from svdconvert.reports.grid import Grid
from svdconvert.reports.maps import HeatMap
from svdconvert.reports.markup import Markup, element
from svdconvert.reports.scales import Scale
from svdconvert.reports.tables import section


def rank_section(facts: Facts, grid: Grid) -> Markup | None:
    """The map; None where nothing was factored."""
    if not facts.matrices:
        return None
    if not grid.drawable:
        return section("ranks", "Where the rank went", element("p", "There is no map of so many layers or kinds."))
    values = {module: kept for module in facts.matrices if (kept := facts.kept(module)) is not None}
    note = (
        "Each cell is a matrix. The number is its rank; the more of its parameters are kept, the stronger its colour."
    )
    if any(matrix.shared_with for matrix in facts.matrices.values()):
        note += " Cells joined by a stroke share their input-side factor, and count as one matrix."
    drawn = HeatMap(
        grid,
        facts,
        "Rank of every matrix, and share of its parameters that is kept",
        values,
        Scale("k", 0.0, 1.0, lambda value: f"{100 * value:.0f} %"),
        lambda module: str(facts.matrices[module].rank),
        lambda module: hint(facts, module),
        lambda modules: f"{100 * _share(facts, modules):.0f}",
        "kept, %",
    ).drawn()
    return section("ranks", "Where the rank went", element("p", note), drawn)


def hint(facts: Facts, module: str) -> str:
    """All that is known of a matrix, in one line."""
    if module in facts.rounded:
        return _rounded_hint(facts, module)
    if module not in facts.matrices:
        return f"{module}: dense, {facts.dense.get(module, '')}"
    matrix = facts.matrices[module]
    kept, (rows, columns) = facts.kept(module), matrix.shape
    parts = [f"{module}: rank {matrix.rank} of a {rows} x {columns} matrix"]
    if matrix.bits:
        parts.append(in_bits(matrix.bits))
    if kept is not None:
        parts.append(f"{figures.share(kept, 1)} of its parameters kept")
    parts.append(f"weights {figures.decimals(matrix.relative_error)}")
    if matrix.output_error is not None:
        parts.append(f"outputs {figures.decimals(matrix.output_error)}")
    if matrix.predicted_loss is not None:
        parts.append(f"predicted loss {figures.decimals(matrix.predicted_loss)}")
    if matrix.shared_with is not None:
        parts.append(f"factor of {matrix.shared_with}")
    return ", ".join(parts)


def _rounded_hint(facts: Facts, module: str) -> str:
    """The same of a matrix that stayed dense, in few bits."""
    matrix = facts.rounded[module]
    parts = [
        f"{module}: a {matrix.shape[0]} x {matrix.shape[1]} matrix, dense, {in_bits(matrix.bits)}",
        f"weights {figures.decimals(matrix.relative_error)}",
    ]
    if matrix.predicted_loss is not None:
        parts.append(f"predicted loss {figures.decimals(matrix.predicted_loss)}")
    return ", ".join(parts)


def _share(facts: Facts, modules: Sequence[str]) -> float:
    """Share of the parameters of factored matrices that is stored."""
    shapes = {module: facts.matrices[module].shape for module in modules}
    sizes = {module: rows * columns for module, (rows, columns) in shapes.items()}
    whole = sum(sizes.values())
    return sum(size * (facts.kept(module) or 0.0) for module, size in sizes.items()) / whole if whole else 0.0
