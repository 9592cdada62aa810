"""The page of what can be had of a model: loss against bytes, and all ways in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdconvert.reports import figures
from svdconvert.reports.chart import Point, line_chart, shape
from svdconvert.reports.document import document
from svdconvert.reports.markup import Markup, element
from svdconvert.reports.tables import scrolling, section, simple_table
from svdconvert.sentences import printable


@dataclass(frozen=True)
class Row:
    """A way to store the model.

    Attributes:
        name, kind, bytes: see :class:`svdconvert.commands.ways.Way`.
        loss: KL where it was measured, else what is predicted, nats per token.
        cells: what its row in the table says after its name.
    """

    name: str
    kind: str
    bytes: int
    loss: float
    cells: Sequence[str]


def options_page(
    model: str, lead: Sequence[str], about: str, heads: Sequence[str], rows: Sequence[Row], *, measured: bool
) -> bytes:
    """A page, in HTML; the same for the same ways.

    Args:
        model: its name.
        lead: advice, in sentences.
        about: what the figures come of.
        heads: of the columns after the name.
        rows: the dense model first.
        measured: whether losses are measured.
    """
    name = printable(model.rstrip("/").split("/")[-1])
    header = element(
        "header",
        element("p", "svdconvert options", class_="over"),
        element("h1", f"What can be had of {name}"),
        element("p", " ".join(lead), class_="lead"),
    )
    cells = [(row.name, *row.cells) for row in rows]
    table = simple_table(about, ("way to store it", *heads), cells, aligned="t" + "n" * len(heads))
    parts = [header, _chart(rows[0], rows[1:], measured), section("numbers", "All ways", scrolling(about, table))]
    return document(f"{name}, options", parts, made_of="what svdconvert options found")


def _chart(dense: Row, rows: Sequence[Row], measured: bool) -> Markup | None:
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.kind, []).append(row)
    if not lines:
        return None
    series: Mapping[str, Sequence[Point]] = {
        kind: [
            Point(row.bytes, row.loss, f"{row.name}: {figures.bytes_text(row.bytes)}, {figures.nats(row.loss)}")
            for row in line
        ]
        for kind, line in lines.items()
    }
    upright = "KL(dense || this), nats per token" if measured else "predicted loss, nats per token"
    label = f"{upright} against bytes of the weight files; the table below has the numbers"
    chart = line_chart(series, label, "bytes of the weight files", upright, figures.rounded, "{:.3g}".format)
    legend = [element("span", shape(number), kind) for number, kind in enumerate(series)]
    note = f"Lower is better. The dense model takes {figures.bytes_text(dense.bytes)}."
    figure = element("figure", scrolling(label, chart), element("p", legend, class_="legend"))
    return section("chart", "Loss against bytes", element("p", note), figure)
