"""How a result came about: command, method, settings, versions, notes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from svdconvert.reports import figures
from svdconvert.reports.facts import Facts, kind_of, layer_of
from svdconvert.reports.markup import Child, Markup, element
from svdconvert.reports.tables import MOST_ROWS, pairs, section

# Of the settings, what stands elsewhere on the page, or says which files were read.
_NOT_SHOWN = {"svdconvert", "command", "config", "weights", "side_file", "adapter", "against"}


def making_section(facts: Facts) -> Markup:
    """The part of the page."""
    record = facts.record
    rows: list[tuple[Child, Child]] = [("model", record.source.name)]
    if record.source.commit is not None:
        rows.append(("commit", element("code", record.source.commit)))
    healing = record.results.get("healing")
    if isinstance(healing, Mapping):
        rows.extend(_teacher(healing))
    architecture = _architecture(facts.settings)
    if architecture:
        rows.append(("architecture", architecture))
    if facts.method is not None:
        rows.append(("method", [element("code", facts.method.name), ": ", facts.method.summary]))
    refit = record.results.get("refit")
    if isinstance(refit, Mapping):
        rows.append(("refit", _plain(refit)))
    if folded := record.results.get("folded"):
        rows.append(("folded", f"{figures.count(len(folded))} layers"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())))
    command = record.results.get("repeat")
    return section(
        "making",
        "How it was made",
        None if command is None else element("pre", element("code", command)),
        pairs(rows),
        _settings(facts.settings),
        _dense(facts),
        _notes(facts),
    )


def _teacher(healing: Mapping[str, Any]) -> list[tuple[Child, Child]]:
    """The dense model whose predictions were learned, and the command that made the model which learned them."""
    rows: list[tuple[Child, Child]] = []
    against, start = healing.get("against"), healing.get("start")
    if isinstance(against, Mapping) and isinstance(against.get("name"), str):
        rows.append(("healed against", against["name"]))
    if isinstance(start, str):
        rows.append(("made before by", element("code", start)))
    return rows


def _settings(settings: Mapping[str, Any]) -> Markup | None:
    """Those that were asked for or matter: no empty ones."""
    shown = {name: value for name, value in settings.items() if name not in {*_NOT_SHOWN, "method"}}
    rows: list[tuple[Child, Child]] = [
        (name, element("code", _plain(value))) for name, value in shown.items() if value not in (None, [], {}, "")
    ]
    return element("div", element("h3", "Settings"), pairs(rows[:MOST_ROWS], short=True)) if rows else None


def _architecture(settings: Mapping[str, Any]) -> str:
    config = settings.get("config")
    name = config.get("model_type") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else ""


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _dense(facts: Facts) -> Markup | None:
    """Targets that stayed dense, by reason and kind."""
    if not facts.dense:
        return None
    groups: dict[tuple[str, str], list[int]] = {}
    for module, reason in facts.dense.items():
        layer = layer_of(module)
        groups.setdefault((reason, kind_of(module)), []).extend([] if layer is None else [layer])
    entries = [
        element("li", element("code", kind), _layers(layers), f": {reason}")
        for (reason, kind), layers in list(groups.items())[:MOST_ROWS]
    ]
    return element("div", element("h3", "Stayed dense"), element("ul", entries))


def _layers(layers: list[int]) -> str:
    """``, layers 0 to 3, 7``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    words = [" to ".join(map(str, run)) for run in runs]
    return f", layer{'s' if len(set(layers)) > 1 else ''} {', '.join(words)}" if words else ""


def _notes(facts: Facts) -> Markup | None:
    notes = [element("li", note) for note in (facts.record.results.get("notes") or [])[:MOST_ROWS]]
    return element("div", element("h3", "Notes"), element("ul", notes)) if notes else None
