"""What was lost: by the whole model, measured against predicted, and by every matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from svdconvert.factoring.matrix_report import RoundedReport
from svdconvert.methods.table import rough_guess
from svdconvert.reports import figures
from svdconvert.reports.facts import Facts, kind_of
from svdconvert.reports.grid import Grid
from svdconvert.reports.maps import HeatMap
from svdconvert.reports.markup import Markup, element
from svdconvert.reports.ranks import hint
from svdconvert.reports.scales import logarithmic
from svdconvert.reports.tables import MOST_ROWS, bar, hidden, scrolling, section, simple_table

# A rug with more strokes is a block.
_MOST_STROKES = 2000


@dataclass(frozen=True)
class Loss:
    """What is known of the loss of every matrix.

    Attributes:
        field: of a matrix's report.
        name: heading.
        unit: of the numbers in the map.
        meaning: what it is.
        adds_up: whether those of all matrices have a sum that means something.
    """

    field: str
    name: str
    unit: str
    meaning: str
    adds_up: bool = False

    @property
    def of_rounded(self) -> bool:
        """Whether it is known of matrices that stayed dense in few bits, too."""
        return self.field in {field.name for field in fields(RoundedReport)}

    def of(self, facts: Facts) -> dict[str, float]:
        """Module path -> number; empty unless all matrices have one.

        Those that stayed dense in few bits are among them, if it is known of such.
        """
        every = facts.changed if self.of_rounded else facts.matrices
        values = {module: getattr(matrix, self.field) for module, matrix in every.items()}
        return {} if None in values.values() else values


LOSSES = (
    Loss(
        "predicted_loss",
        "Predicted loss",
        "percent of its sum",
        "What each matrix is estimated to add to the loss, nats per token.",
        adds_up=True,
    ),
    Loss(
        "output_error",
        "Error of the outputs",
        "percent",
        "Relative error of each layer's outputs on the calibration text, before rounding.",
    ),
    Loss(
        "relative_error",
        "Error of the weights",
        "percent",
        "Relative error of each matrix W as it is stored, W': ||W - W'|| / ||W||.",
    ),
)


def measured_section(facts: Facts) -> Markup | None:
    """The loss of the whole model; None where nothing is known of it."""
    measured, predicted, dense = (facts.number(f"{name}_loss") for name in ("measured", "predicted", "dense"))
    budget = facts.record.results.get("budget")
    if measured is None and predicted is None and budget is None:
        return None
    longest = max(abs(value or 0.0) for value in (measured, predicted)) or 1.0
    rows = []
    for name, value, kind in (("measured", measured, "lost"), ("predicted", predicted, "guess")):
        if value is not None:
            after = "" if dense is None else figures.perplexity(dense + value)
            rows.append((name, bar(abs(value) / longest, kind=kind), figures.signed_nats(value), after))
    caption = "Added loss on the calibration text, nats per token"
    heads = (hidden("loss"), hidden("bars"), "added", "perplexity")
    notes = []
    if dense is not None:
        notes.append(
            f"The dense model has a loss of {figures.nats(dense)}, perplexity {figures.perplexity(dense)}, there."
        )
    if predicted is not None:
        notes.append(f"The prediction is {rough_guess(worths=_has_worths(facts))}.")
    if measured is None:
        notes.append("The written model was not measured.")
    table = scrolling(caption, simple_table(caption, heads, rows, aligned="ttnn")) if rows else None
    text = element("p", " ".join(notes), class_="note")
    return section("loss", "Measured against predicted", table, text, None if budget is None else _budget(budget))


def _has_worths(facts: Facts) -> bool:
    return any(matrix.worth is not None for matrix in facts.changed.values())


def _budget(budget: Mapping[str, Any]) -> Markup:
    """What was measured to choose the ranks."""
    said = (
        f"On {figures.count(budget['tokens'])} held-out tokens of the calibration text, what was chosen adds "
        f"{figures.signed_nats(budget['added'])} to a loss of {figures.nats(budget['dense_loss'])}; "
        f"KL(dense || model) is {figures.nats(budget['kl'])}."
    )
    if budget.get("rounded_to") is not None:
        said += f" All of this is before rounding to {figures.count(budget['rounded_to'])} bits."
    sizes = [(figures.share(size["share"], 1), size) for size in budget.get("sizes") or []]
    names = ("global", *(f"correction {number}" for number in range(1, MOST_ROWS)))
    rounds = list(zip(names, budget.get("rounds") or [], strict=False))
    tried = [(one["name"], one) for one in budget.get("tried") or []]
    return element(
        "div",
        element("h3", f"Measured to choose {'ranks and bits' if tried else 'the ranks'}"),
        element("p", said),
        _trials("Sizes that were tried, nats per token", "kept", sizes),
        _trials("The global budget and its corrections, nats per token", "ranks", rounds),
        _trials("What was tried, nats per token", "bytes spent on", tried),
    )


def _trials(caption: str, head: str, trials: Sequence[tuple[str, Mapping[str, float]]]) -> Markup | None:
    """A table of what was measured, by name; None where nothing was."""
    if not trials:
        return None
    rows = [
        (name, figures.signed_nats(trial["added"]), figures.nats(trial["kl"])) for name, trial in trials[:MOST_ROWS]
    ]
    return scrolling(caption, simple_table(caption, (head, "added", "KL"), rows, aligned="tnn"))


def lost_section(facts: Facts, grid: Grid) -> Markup | None:
    """What every matrix has lost: maps, and a summary by kind."""
    known = [(loss, values) for loss in LOSSES if (values := loss.of(facts))]
    if not known:
        return None
    note = "The more a matrix lost, the stronger its colour. Each map has its own scale, whose steps are equal ratios."
    parts = [
        (
            element("h3", loss.name),
            element("p", loss.meaning, None if loss.of_rounded or not facts.rounded else " Of products only."),
            _map(facts, grid, loss, values) if grid.drawable else None,
            _summary(loss, values),
        )
        for loss, values in known
    ]
    return section("lost", "What each matrix lost", element("p", note) if grid.drawable else None, parts)


def _map(facts: Facts, grid: Grid, loss: Loss, values: Mapping[str, float]) -> Markup:
    """Errors in percent; what adds up in percent of its sum."""
    total = sum(values.values()) if loss.adds_up else 1.0

    def percent(value: float) -> str:
        part = 100 * value / total if total > 0 else 0.0
        return f"{part:.1f}".removeprefix("0") if loss.adds_up and part < 9.95 else f"{part:.0f}"

    def of_all(modules: Sequence[str]) -> str:
        numbers = [values[module] for module in modules]
        return percent(sum(numbers) if loss.adds_up else median(numbers))

    return HeatMap(
        grid,
        facts,
        f"{loss.name}, {loss.unit}",
        values,
        logarithmic("l", list(values.values()), figures.in_column(list(values.values()))),
        lambda module: percent(values[module]),
        lambda module: hint(facts, module),
        of_all,
        "sum" if loss.adds_up else "median",
    ).drawn()


def _summary(loss: Loss, values: Mapping[str, float]) -> Markup:
    """A table by kind, with a stroke for every matrix."""
    kinds: dict[str, dict[str, float]] = {}
    for module, value in values.items():
        kinds.setdefault(kind_of(module), {})[module] = value
    highest, write = max(values.values()), figures.in_column(list(values.values()))
    rows = []
    for kind, same in list(kinds.items())[:MOST_ROWS]:
        worst = max(same, key=lambda module: same[module])
        numbers = list(same.values())
        cells = [write(value) for value in (min(numbers), median(numbers), max(numbers))]
        rows.append((kind, _rug(numbers, highest), *cells, element("td", worst)))
    ends = element("span", element("span", "0"), element("span", write(highest)), class_="ends")
    heads = ("kind", ends, "lowest", "median", "highest", element("span", "highest in"))
    caption = f"{loss.name} by kind"
    return scrolling(caption, simple_table(caption, heads, rows, aligned="ttnnnt"))


def _rug(numbers: Sequence[float], highest: float) -> Markup:
    """A stroke for each number between 0 and the highest, and a longer one at the median."""

    def at(value: float) -> float:
        return 100 * min(max(value / highest, 0.0), 1.0) if highest > 0 else 0.0

    strokes = "".join(f"M{at(value):.1f} 3V13" for value in numbers[:_MOST_STROKES])
    middle = f"M{at(median(numbers)):.1f} 0V16"
    drawn = [
        element("path", d="M0 15.5H100", class_="axis"),
        element("path", d=strokes),
        element("path", d=middle, class_="median"),
    ]
    return element(
        "td",
        element("svg", drawn, viewBox="-1 0 102 16", preserveAspectRatio="none", aria_hidden="true"),
        class_="rug",
    )
