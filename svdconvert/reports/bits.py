"""Where the bits went: what is stored for every weight of a matrix, in a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport
from svdconvert.grids import Grid as IntegerGrid
from svdconvert.reports.facts import Facts, kind_of
from svdconvert.reports.grid import Grid
from svdconvert.reports.maps import HeatMap
from svdconvert.reports.markup import Markup, element
from svdconvert.reports.ranks import hint
from svdconvert.reports.scales import Scale
from svdconvert.reports.tables import section

# Bits of a weight that is on no grid, or of a scale, where the record does not say what the weights before took.
_FLOAT = 16.0
# Bits of a word of packed integers, which a row fills up.
_WORD = 32


def bits_section(facts: Facts, grid: Grid) -> Markup | None:
    """The map; None where no weight is in few bits, or there is nothing to draw."""
    if not facts.in_few_bits or not grid.drawable:
        return None
    values = bits_per_weight(facts)

    def average(modules: Sequence[str]) -> str:
        sizes = [_entries(facts, module) for module in modules]
        bits = sum(size * values[module] for size, module in zip(sizes, modules, strict=True))
        return f"{bits / (sum(sizes) or 1):.1f}"

    note = (
        "Each cell is a matrix. The number is what is stored of it, integers and scales, in bits for each weight of "
        "the dense matrix; of a product of low rank, both factors together."
    )
    drawn = HeatMap(
        grid,
        facts,
        "Bits per weight of the dense matrix",
        values,
        Scale("k", 0.0, max(values.values()), lambda value: f"{value:.1f}"),
        lambda module: f"{values[module]:.1f}",
        lambda module: hint(facts, module),
        average,
        "average",
    ).drawn()
    return section("bits", "Where the bits went", element("p", note), drawn)


def bits_per_weight(facts: Facts) -> dict[str, float]:
    """Module path -> bits stored for each of the dense matrix's weights, scales included.

    A matrix that stayed as it was is left out where its type is not known.
    """
    plain = {module: bits for module in facts.dense if (bits := _before(facts, module)) is not None}
    changed = {
        module: _stored(matrix, _before(facts, module) or _FLOAT) / (math.prod(matrix.shape) or 1)
        for module, matrix in facts.changed.items()
    }
    return {**plain, **changed}


def _stored(matrix: MatrixReport | RoundedReport, float_bits: float) -> float:
    """Bits of a matrix, or of its factors, the input-side one first."""
    rows, columns = matrix.shape
    shapes = [(rows, columns)]
    if isinstance(matrix, MatrixReport):
        shapes = [(matrix.rank, columns), (rows, matrix.rank)]
    count, stored = len(shapes), 0.0
    for shape, bits, group in zip_longest(shapes, (matrix.bits or ())[:count], (matrix.groups or ())[:count]):
        if bits is None or bits >= _FLOAT:
            stored += math.prod(shape) * float_bits
        else:
            on = IntegerGrid(bits, group or 0)
            stored += math.prod(on.words(shape)) * _WORD + math.prod(on.scales(shape)) * float_bits
    return stored


def _before(facts: Facts, module: str) -> float | None:
    """Bits of a weight before, which are those of scales and of weights on no grid; None where they are not known."""
    kind = facts.kinds.get(kind_of(module))
    if kind is None or kind.bytes is None or not kind.params.before:
        return None
    return 8 * kind.bytes.before / kind.params.before


def _entries(facts: Facts, module: str) -> float:
    """Weights of a dense matrix: of one that stayed as it was, those of its kind on average."""
    if module in facts.changed:
        return math.prod(facts.changed[module].shape)
    kind = facts.kinds[kind_of(module)]
    return kind.params.before / (kind.matrices or 1)
