"""The page of a sweep: what every size costs, by every way to convert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdconvert.reports import figures
from svdconvert.reports.chart import Point, line_chart, shape
from svdconvert.reports.document import document
from svdconvert.reports.markup import Child, Markup, element
from svdconvert.reports.tables import MOST_ROWS, scrolling, section, simple_table
from svdconvert.sentences import printable

# So many lines can be told apart in a chart; more are in the table alone.
_MOST_LINES = 14


@dataclass(frozen=True)
class Row:
    """A model of a sweep.

    Attributes:
        budget: ``60% kept`` or ``rank 128``; empty for the dense model.
        params: parameters of the whole model.
        bytes: of its weight files.
        perplexity: on the text.
        added: log-perplexity on top of the dense model's, nats per token.
        kl: KL(dense || model), nats per token; None where it was not measured.
    """

    budget: str
    params: int
    bytes: int
    perplexity: float
    added: float
    kl: float | None


def sweep_page(model: str, text: str, headline: str, dense: Row, lines: Mapping[str, Sequence[Row]]) -> bytes:
    """A page about a sweep, in HTML; the same for the same sweep.

    Args:
        model, text: what was measured on what.
        headline: the best point of the smallest budget, in one sentence.
        dense: the untouched model.
        lines: what points have in common -> those points, the largest first.
    """
    name = printable(model.rstrip("/").split("/")[-1])
    header = element(
        "header",
        element("p", "svdconvert sweep", class_="over"),
        element("h1", f"{name} at several sizes"),
        element("p", headline[:1].upper() + headline[1:], ".", class_="lead"),
    )
    return document(f"{name}, sweep", [header, _chart(lines, dense), _table(lines, dense, text)], made_of="sweep.json")


def _chart(lines: Mapping[str, Sequence[Row]], dense: Row) -> Markup | None:
    """KL where all points have it, else the added loss, against parameters."""
    rows = [row for line in lines.values() for row in line]
    if not rows:
        return None
    by_kl = all(row.kl is not None for row in rows)
    shown = dict(list(lines.items())[:_MOST_LINES])
    series = {
        name: [Point(row.params, (row.kl or 0.0) if by_kl else row.added, _hint(name, row)) for row in line]
        for name, line in shown.items()
    }
    title = "Distance from the dense model" if by_kl else "Added loss"
    upright = "KL(dense || model), nats per token" if by_kl else "added log-perplexity, nats per token"
    label = f"{title} against parameters; the table below has the numbers"
    chart = line_chart(series, label, "parameters of the model", upright, figures.rounded, "{:.3g}".format)
    legend = [element("span", shape(number), name) for number, name in enumerate(shown)]
    note = f"Lower is better. The dense model has {figures.count(dense.params)} parameters."
    if len(lines) > len(shown):
        note += f" {len(lines) - len(shown)} more lines are in the table."
    return section(
        "chart",
        title,
        element("p", note),
        element("figure", scrolling(label, chart), element("p", legend, class_="legend")),
    )


def _table(lines: Mapping[str, Sequence[Row]], dense: Row, text: str) -> Markup:
    rows: list[Sequence[Child]] = [("dense", *_cells(dense, dense))]
    rows += [(name, *_cells(row, dense)) for name, line in lines.items() for row in line][:MOST_ROWS]
    caption = f"Measured on {printable(text)}; losses in nats per token"
    heads = ("way to convert", "budget", "parameters", "of dense", "weight files", "perplexity", "added", "KL")
    return section(
        "numbers", "All points", scrolling(caption, simple_table(caption, heads, rows, aligned="tnnnnnnn"), tall=True)
    )


def _cells(row: Row, dense: Row) -> list[str]:
    return [
        row.budget,
        figures.count(row.params),
        figures.share(row.params, dense.params),
        figures.bytes_text(row.bytes),
        f"{row.perplexity:,.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.3g}",
        "" if row is dense else figures.signed_nats(row.added),
        "" if row.kl is None else figures.nats(row.kl),
    ]


def _hint(name: str, row: Row) -> str:
    kl = "" if row.kl is None else f", KL {figures.nats(row.kl)}"
    return f"{name}, {row.budget}: {figures.count(row.params)} parameters, added {figures.signed_nats(row.added)}{kl}"
