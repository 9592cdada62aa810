"""Records of earlier versions, of other commands, and of somebody who means ill."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.html_pages import Node, parse

from svdconvert import InputError
from svdconvert.jobs.record import Record
from svdconvert.reports import matrices
from svdconvert.reports.result_page import result_page

Document = dict[str, Any]


def page(document: Document) -> Node:
    record = Record.from_json(json.loads(json.dumps(document)), "svdconvert.json")
    return parse(result_page(record, "svdconvert.json"))


def sections(root: Node) -> list[str]:
    return [node.attributes["id"] or "" for node in root.all("section")]


@pytest.fixture
def document(results: dict[str, Path]) -> Document:
    return copy.deepcopy(json.loads((results["calibrated"] / "svdconvert.json").read_text()))


# Of records: fields that came after the first version.
LATER = ["kinds", "repeat", "bytes", "notes", "dense_targets", "refit", "tensors", "files", "versions"]
OF_A_MATRIX = ["output_error", "predicted_loss", "seconds", "precision", "solver", "shared_with", "optimal_error"]


def test_an_early_record(document: Document) -> None:
    full = sections(page(document))
    assert full == ["loss", "ranks", "lost", "sizes", "time", "making", "matrices"]
    for name in [*LATER, "predicted_loss", "dense_loss", "measured_loss"]:
        document.pop(name, None)
    for matrix in document["matrices"].values():
        for name in OF_A_MATRIX:
            matrix.pop(name, None)
    root = page(document)
    assert sections(root) == [name for name in full if name != "loss"]
    assert "None" not in root.text
    assert "was not measured" in root.text


@pytest.mark.parametrize("name", [*LATER, "predicted_loss", "dense_loss", "measured_loss"])
def test_one_field_less(document: Document, name: str) -> None:
    document.pop(name, None)
    assert "None" not in page(document).text


@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_a_matrix_with_one_field_less(document: Document, name: str) -> None:
    next(iter(document["matrices"].values())).pop(name, None)
    assert "None" not in page(document).text


def test_a_measured_budget(document: Document) -> None:
    sizes = [{"share": 0.5, "kl": 0.25, "added": 0.125}, {"share": 0.7, "kl": 0.0625, "added": -0.03125}]
    budget = {"kl": 0.0625, "added": -0.03125, "dense_loss": 4.5, "tokens": 12345, "share": 0.7, "sizes": sizes}
    root = page({**document, "budget": budget})
    table = list(root.named("loss").all("table"))[1]
    rows = [[cell.text for cell in row.children] for row in next(table.all("tbody")).children]
    assert rows == [["50.0 %", "+0.1250", "0.2500"], ["70.0 %", "-0.0312", "0.0625"]]
    assert "On 12,345 held-out tokens" in root.text
    corrected = page({**document, "budget": {**budget, "sizes": None, "rounds": [sizes[0], sizes[1]]}})
    table = list(corrected.named("loss").all("table"))[1]
    rows = [[cell.text for cell in row.children] for row in next(table.all("tbody")).children]
    assert rows == [["global", "+0.1250", "0.2500"], ["correction 1", "-0.0312", "0.0625"]]
    for name in ("measured_loss", "predicted_loss", "dense_loss"):
        document.pop(name)
    del budget["sizes"]
    assert "On 12,345 held-out tokens" in page({**document, "budget": budget}).text


def test_no_settings_and_no_times(document: Document) -> None:
    root = page({**document, "settings": {}, "timing": []})
    assert "time" not in sections(root)
    assert not list(root.all("aside")), "no method, no advice"


def test_other_commands(document: Document) -> None:
    """densify counts matrices, fold names layers; both have one number of parameters."""
    base = {name: document[name] for name in ("format", "versions", "source", "timing")}
    settings = {"settings": {"max_shard_bytes": 5_000_000_000}, "params": 1234567}
    folded = page({**base, **settings, "command": "fold", "folded": ["layers.0.attention.dense"]})
    multiplied = page({**base, **settings, "command": "densify", "matrices": 12})
    for root in (folded, multiplied):
        assert sections(root) == ["time", "making"]
        assert "1,234,567 parameters" in root.text
    assert "adapter folded in" in next(folded.all("h1")).text


def test_a_healed_model(document: Document) -> None:
    """The dense model by its name: what recognises its files is nothing to read."""
    document["settings"]["against"] = {"weights": {"model.safetensors": "1-a"}, "config": {"vocab_size": 4016}}
    changes = {"kl": 0.5, "added": 0.5, "perplexity": 9.5}
    judged = {"before": changes, "after": changes, "dense_loss": 2.0, "dense_perplexity": 8.5, "held_out_tokens": 8}
    healing = {"changed": True, **judged, "tokens": 64, "steps": 2, "lr": 0.001}
    told = {"against": {"name": "a teacher", "repo": None, "commit": None}, "start": "svdconvert model --keep 0.6"}
    making = page({**document, "healing": {**healing, **told}}).named("making")
    rows = {name.text: value.text for name, value in zip(making.all("dt"), making.all("dd"), strict=True)}
    assert rows["healed against"] == "a teacher"
    assert rows["made before by"] == "svdconvert model --keep 0.6"
    assert "against" not in rows
    assert "vocab_size" not in making.text
    assert "healed against" not in page({**document, "healing": healing}).text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><style>*{background:url(http://example.com)}</style>",
    "</title></head><body onload=x>",
    "&#x3c;b&#x3e; ]]> <!-- \u202e \x00 \x1b[31m \u2028",
    "'; javascript:alert(1)//",
]


@pytest.mark.parametrize("said", HOSTILE)
def test_text_stays_text(document: Document, said: str) -> None:
    """In every place of a record that holds a text, names of modules among them."""
    before = [node.name for node in page(document).all()]
    names = list(document["matrices"])
    replaced = {name: f"layers.{i}.{said}" if i < 2 else name for i, name in enumerate(names)}
    hostile = {
        **document,
        "source": {"name": said, "repo": said, "commit": said},
        "versions": {said: said},
        "settings": {**document["settings"], "calibration": said, said: said, "config": {"model_type": said}},
        "matrices": {replaced[name]: matrix | {"precision": said} for name, matrix in document["matrices"].items()},
        "dense_targets": {f"layers.2.{said}": said, said: said},
        "notes": [said],
        "repeat": said,
        "kinds": {said: next(iter(document["kinds"].values()))},
        "timing": [{said: {"wall_seconds": 1, "cpu_seconds": 1}}],
    }
    root = page(hostile)
    assert {node.name for node in root.all()} <= {*before, "ul", "li", "h3"}
    assert not [node for node in root.all() if {"src", "onerror", "onload", "style"} & set(node.attributes)]
    assert len(list(root.all("style"))) == len(list(root.all("body"))) == len(list(root.all("title"))) == 1
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
    assert root.text.count(escaped) >= 8
    assert not set(root.text) & set("\u202e\x00\x1b\u2028")


def put(*path: Any) -> Callable[[Document], None]:
    """Sets a place in the record to a value, the last of the arguments; ``*`` is the first of an object's keys."""

    def edit(document: Document) -> None:
        *keys, last, value = path
        place: Any = document
        for key in keys:
            place = next(iter(place.values())) if key == "*" else place[key]
        place[last] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        put("matrices", "*", "shape", [1, 2, 3]),
        put("matrices", "*", "shape", [-1, 2]),
        put("matrices", "*", "output_error", "much"),
        put("matrices", "*", "shared_with", 7),
        put("matrices", "*", "seconds", []),
        put("settings", "layout", "round"),
        put("settings", "tokens", "many"),
        put("source", "commit", {"a": 1}),
        put("bytes", [1, 2]),
        put("kinds", {"a": 3}),
        put("dense_targets", ["a"]),
        put("notes", "a note"),
        put("versions", {"torch": 2}),
        put("repeat", 3),
        put("budget", {"kl": 1, "added": 1, "dense_loss": 1, "tokens": 1, "sizes": [{"share": 1}]}),
        put("budget", {"kl": 1, "added": 1, "dense_loss": 1, "tokens": 1, "rounds": [1]}),
        put("refit", "yes"),
    ],
)
def test_a_damaged_field_is_named(document: Document, edit: Callable[[Document], None]) -> None:
    before = json.dumps(document)
    edit(document)
    assert json.dumps(document) != before
    with pytest.raises(InputError, match=r"svdconvert.json is damaged: its '\w+' is .+; convert again with overwrite"):
        page(document)


@pytest.mark.parametrize(
    "values",
    [
        {"relative_error": 0.0, "predicted_loss": 0.0, "output_error": 0.0},
        {"relative_error": -1.0, "predicted_loss": -1e-9, "output_error": 1e300},
        {"rank": 0, "shape": [0, 0]},
        {"rank": 2**62, "shape": [2**62, 2**62], "seconds": 1e300},
        {"shared_with": "nobody"},
        {"shared_with": "layers.0.attention.query_key_value"},
    ],
)
def test_numbers_beyond_reason(document: Document, values: Document) -> None:
    for name, matrix in document["matrices"].items():
        matrix |= {field: value for field, value in values.items() if value != name}
    document |= {"measured_loss": 1e6, "dense_loss": 1e6, "predicted_loss": -1e300}
    document["timing"] = [{"solve": {"wall_seconds": 1e300, "cpu_seconds": -5, "workers": 2}}]
    text = page(document).text
    assert "nan" not in text.lower().replace("finance", "")


def test_sizes_are_bounded(document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many layers have no map, many matrices no end of rows, long names and layers of absurd numbers no place."""
    matrix = {**next(iter(document["matrices"].values()))}
    base = {**document, "dense_targets": {}, "kinds": None}
    layers = page({**base, "matrices": {f"layers.{i}.a": matrix for i in range(500)}})
    assert not list(layers.named("ranks").all("table"))
    assert len(list(layers.named("matrices").all("tr"))) == 501
    strange = {f"layers.{'9' * 5000}.a": matrix, "x" * 10**5: matrix, "head": matrix, "layers.1.a": matrix}
    root = page({**base, "matrices": strange, "notes": ["y" * 10**6], "repeat": "z" * 10**6})
    (drawn,) = root.named("ranks").all("table")
    assert [cell.text for cell in next(drawn.all("thead")).all("th")] == ["layer", "1", "kept, %"]
    assert len(root.text) < 100_000
    monkeypatch.setattr(matrices, "MOST_MATRICES", 50)
    many = page({**base, "matrices": {f"layers.{i % 10}.mlp.{i // 10}": matrix for i in range(3_000)}})
    assert len(list(many.named("matrices").all("tr"))) == 51
    assert "2,950 more are in svdconvert.json" in many.text
    assert not list(many.named("ranks").all("table"))
    assert len(many.text) < 1_000_000
