"""Maps: a table of kinds of matrix by layers, whose cells have a colour each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from svdconvert.reports.facts import Facts
from svdconvert.reports.grid import Grid
from svdconvert.reports.markup import Markup, element
from svdconvert.reports.scales import Scale
from svdconvert.reports.tables import broken, caption_of, hidden, scrolling

# Up to so many layers, cells are wide, every layer has its number above it, and every cell has its own number in it.
_FEW, _ALL_NUMBERED, _ALL_FILLED = 16, 32, 48


@dataclass(frozen=True)
class HeatMap:
    """A map.

    Attributes:
        grid: where its matrices are.
        facts: those that stayed dense, and which share a factor.
        title: its caption.
        values: module path -> number, on the scale.
        scale: of the numbers.
        short: what a cell says of a module, in a few characters.
        hint: all about a module, shown where the pointer is.
        sums: what is told of all matrices of a kind or a layer.
        word: what that is.
    """

    grid: Grid
    facts: Facts
    title: str
    values: Mapping[str, float]
    scale: Scale
    short: Callable[[str], str]
    hint: Callable[[str], str]
    sums: Callable[[Sequence[str]], str]
    word: str

    def drawn(self) -> Markup:
        """The map with its legend."""
        grid = self.grid
        count = len(grid.layers)
        corner, last = element("th", "layer", scope="col"), element("th", self.word, scope="col")
        rows = [
            element(
                "tr",
                element("th", broken(kind), scope="row"),
                [self._cell(grid.modules.get((kind, layer))) for layer in grid.layers],
                self._sum(grid.row(kind)),
            )
            for kind in grid.kinds
        ]
        columns = [self._sum(grid.column(layer) if count <= _ALL_FILLED else ()) for layer in grid.layers]
        foot = [element("th", self.word, scope="row"), columns, self._sum(list(grid.modules.values()))]
        table = element(
            "table",
            caption_of(self.title),
            element("thead", element("tr", corner, self._heads(), last)),
            element("tbody", rows),
            element("tfoot", element("tr", foot)),
            class_=f"map {'few' if count <= _FEW else 'many' if count <= _ALL_FILLED else 'narrow'}",
        )
        return element("figure", scrolling(self.title, table), self._legend())

    def _heads(self) -> list[Markup]:
        """Numbers of the layers; where they are many, some are read aloud only."""
        count = len(self.grid.layers)
        every = 1 if count <= _ALL_NUMBERED else 5 if count <= _ALL_FILLED else 10
        return [
            element("th", hidden(str(layer)) if place % every else str(layer), scope="col")
            for place, layer in enumerate(self.grid.layers)
        ]

    def _cell(self, module: str | None) -> Markup:
        if module is None:
            return element("td")
        if module not in self.values:
            word, kind = ("dense", "dense") if module in self.facts.dense else ("unknown", None)
            return element("td", hidden(word), class_=kind, title=self.hint(module))
        matrix, text = self.facts.matrices.get(module), self.short(module)
        follows = matrix is not None and matrix.shared_with is not None
        shade = self.scale.shade(self.values[module]) + (" follows" if follows else "")
        shown = text if len(self.grid.layers) <= _ALL_FILLED else hidden(text)
        return element("td", shown, class_=shade, title=self.hint(module))

    def _sum(self, modules: Sequence[str]) -> Markup:
        known = [module for module in modules if module in self.values]
        return element("td", self.sums(known) if known else None, class_="sum")

    def _legend(self) -> Markup:
        swatch = element("span", class_="dense swatch", aria_hidden="true")
        without = set(self.grid.modules.values()) - set(self.values)
        some_dense = not without.isdisjoint(self.facts.dense)
        dense = element("span", swatch, " stayed dense") if some_dense else None
        return element("p", self.scale.legend, dense, class_="legend")
