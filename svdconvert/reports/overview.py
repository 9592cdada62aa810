"""The top of a result's page: what it is, in one sentence, a few numbers, and what to do next."""

from __future__ import annotations

from pathlib import Path

from svdconvert.methods.table import calibrated
from svdconvert.planning.advice import next_steps
from svdconvert.reports import figures
from svdconvert.reports.facts import Facts
from svdconvert.reports.markup import Markup, element
from svdconvert.reports.tables import tiles
from svdconvert.settings.told import told

# What a command did with its source.
_DONE = {"convert": "factored", "densify": "multiplied out", "fold": "adapter folded in", "heal": "healed"}


def title(facts: Facts) -> str:
    """``SmolLM2-135M, factored``."""
    name = facts.record.source.name.rstrip("/").split("/")[-1] or "model"
    done = _DONE.get(facts.record.command, facts.record.command)
    if facts.rounded and facts.record.command == "convert":
        done = "factored and rounded" if facts.matrices else "rounded"
    return f"{name}, {done}"


def header(facts: Facts) -> Markup:
    """Name, one sentence, and numbers."""
    return element(
        "header",
        element("p", "svdconvert ", facts.record.command, class_="over"),
        element("h1", title(facts)),
        element("p", lead(facts), class_="lead"),
        tiles(_tiles(facts)),
    )


def lead(facts: Facts) -> str:
    """The result in one or two sentences."""
    before, after = facts.params
    if before is None:
        return f"The model has {figures.count(after)} parameters.{_healed(facts)}"
    sentence = f"{_sizes(facts, before, after)}: {_became(facts)}"
    measured, dense = facts.number("measured_loss"), facts.number("dense_loss")
    if facts.record.results.get("healing") is not None:
        return f"{sentence}.{_healed(facts)}"
    if measured is None or dense is None:
        return f"{sentence}. What this costs was not measured."
    return (
        f"{sentence}. On the calibration text the perplexity went from {figures.perplexity(dense)} to "
        f"{figures.perplexity(dense + measured)}."
    )


def _sizes(facts: Facts, before: int, after: int) -> str:
    """What is left: of the bytes first where weights are in few bits."""
    parameters = (
        f"{figures.count(before)} parameters became {figures.count(after)}, {figures.share(after, before)} of them"
    )
    if not facts.in_few_bits or facts.bytes is None:
        return parameters
    old, new = facts.bytes.before, facts.bytes.after
    files = (
        f"{figures.bytes_text(old)} of weights became {figures.bytes_text(new)}, {figures.share(new, old)} of the bytes"
    )
    return files if after == before else f"{files}, and {parameters}"


def _became(facts: Facts) -> str:
    """How many matrices became what."""
    parts = []
    if facts.matrices or not facts.rounded:
        parts.append(f"{_matrices(len(facts.matrices))} now products of low rank")
    if facts.rounded:
        parts.append(
            f"{figures.count(len(facts.rounded))} stayed dense in few bits"
            if parts
            else f"{_matrices(len(facts.rounded))} now rounded to few bits"
        )
    if plain := len(facts.dense) - len(facts.rounded):
        parts.append(f"{figures.count(plain)} stayed dense")
    return ", and ".join(parts)


def _healed(facts: Facts) -> str:
    """What training was worth; the record's fields were looked at when it was read."""
    healing = facts.record.results.get("healing")
    if healing is None:
        return ""
    if not healing["changed"]:
        return " Training it to the dense model's predictions brought no gain, so it is what it was."
    kls = " to ".join(figures.nats(healing[when]["kl"]) for when in ("before", "after"))
    dense = healing["dense_loss"]
    perplexities = " to ".join(figures.perplexity(dense + healing[when]["added"]) for when in ("before", "after"))
    return (
        f" Training it to the dense model's predictions brought KL(dense ‖ model) from {kls} nats per token on "
        f"{figures.count(healing['held_out_tokens'])} held-out tokens, and the perplexity from {perplexities} (dense "
        f"{figures.perplexity(dense)})."
    )


def _matrices(number: int) -> str:
    return "one matrix is" if number == 1 else f"{figures.count(number)} matrices are"


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    before, after = facts.params
    rows = [("Parameters", figures.rounded(after), "" if before is None else f"of {figures.rounded(before)}")]
    if before is not None:
        rows[0] = (rows[0][0], figures.share(after, before), f"{figures.rounded(before)} → {figures.rounded(after)}")
    if facts.bytes is not None:
        old, new = facts.bytes.before, facts.bytes.after
        files = ("Weight files", figures.share(new, old), f"{figures.bytes_text(old)} → {figures.bytes_text(new)}")
        rows.insert(0 if facts.in_few_bits else 1, files)
    measured, predicted = facts.number("measured_loss"), facts.number("predicted_loss")
    if measured is not None:
        more = "nats per token, measured" + (
            "" if predicted is None else f" ({figures.signed_nats(predicted)} predicted)"
        )
        rows.append(("Loss added", figures.signed_nats(measured), more))
    elif predicted is not None:
        rows.append(("Loss added", figures.signed_nats(predicted), "nats per token, predicted and not measured"))
    if facts.method is not None:
        tokens = facts.settings.get("tokens")
        text = "no text" if tokens is None else calibrated(facts.method, _with_options(facts))
        rows.append(("Method", facts.method.name, text))
    return rows


def _with_options(facts: Facts) -> dict[str, float]:
    """The settings, with a method's options that an early record does not have."""
    assert facts.method is not None
    given = {name: facts.settings.get(name) for name in facts.method.options}
    known = {name: value for name, value in given.items() if isinstance(value, int | float)}
    return {**facts.method.options, **known, "tokens": facts.settings["tokens"]}


def advice(facts: Facts) -> Markup | None:
    """What to do next; nothing where no method is known."""
    if facts.method is None:
        return None
    sentence = told(next_steps(facts.method, facts.settings, Path("DIR")))
    return element(
        "aside", element("h2", "Next"), element("p", sentence[:1].upper() + sentence[1:], "."), class_="next"
    )
