"""The page of a result has the numbers of its record, and of the weights themselves."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from safetensors.torch import load_file
from support.checkpoints import TARGETS, read_weights
from support.html_pages import LOADING, Node, contrast, parse, rules

from svdconvert import report
from svdconvert.reports.chart import SERIES
from svdconvert.reports.document import document
from svdconvert.reports.markup import element

NAMES = ["calibrated", "shared", "some dense"]


def page_of(folder: Path) -> Node:
    return parse((folder / "report.html").read_bytes())


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "svdconvert.json").read_text())


def cells(table: Node) -> list[list[str]]:
    """The texts of a table's body."""
    (body,) = table.all("tbody")
    return [[cell.text for cell in row.children] for row in body.children]


def table_of(page: Node, name: str, number: int = 0) -> Node:
    """A table of the section with an id."""
    return list(page.named(name).all("table"))[number]


def near(text: str, number: float) -> bool:
    """Whether a text is a number with the digits that it shows, two of which count."""
    mantissa, _, power = text.partition("e")
    unit = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    return abs(float(text) - number) <= 0.501 * unit and (unit <= abs(number) / 9 or unit <= 1e-4)


def parameters(folder: Path, module: str) -> tuple[int, int]:
    """Parameters of a matrix as the weight files hold it: those of its own, and those of its input-side factor."""
    tensors = load_file(folder / "model.safetensors")
    stem = f"gpt_neox.{module}."
    down = tensors.get(f"{stem}down.weight")
    return tensors[f"{stem}up.weight"].numel(), 0 if down is None else down.numel()


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_with_its_numbers(results: dict[str, Path], name: str) -> None:
    record = record_of(results[name])
    rows = {row[0]: row[1:] for row in cells(table_of(page_of(results[name]), "matrices"))}
    assert set(rows) == {*record["matrices"], *record["dense_targets"]}
    heads = next(table_of(page_of(results[name]), "matrices").all("thead")).text
    assert ("predicted loss" in heads, "outputs" in heads) == ((True, True) if name == "calibrated" else (False, False))
    for module, matrix in record["matrices"].items():
        shape, rank, _, weights, *more = rows[module]
        assert (shape, int(rank)) == ("{} x {}".format(*matrix["shape"]), matrix["rank"])
        assert near(weights, matrix["relative_error"])
        if name == "calibrated":
            assert near(more[0], matrix["output_error"])
            assert near(more[1], matrix["predicted_loss"])
        if name == "shared":
            assert more[-1] == matrix.get("shared_with", "")
    assert all(rows[module][1] == "dense" for module in record["dense_targets"])
    assert bool(record["dense_targets"]) == (name != "shared")


@pytest.mark.parametrize("name", NAMES)
def test_kept_shares_are_those_of_the_weights(results: dict[str, Path], name: str) -> None:
    """Counted in the weight files; layers that share a factor count as one matrix."""
    folder, record = results[name], record_of(results[name])
    rows = {row[0]: row for row in cells(table_of(page_of(folder), "matrices"))}
    groups: dict[str, list[str]] = {}
    for module, matrix in record["matrices"].items():
        groups.setdefault(matrix.get("shared_with", module), []).append(module)
    assert (max(map(len, groups.values())) == 2) == (name == "shared")
    for modules in groups.values():
        stored = sum(sum(parameters(folder, module)) for module in modules)
        whole = sum(math.prod(record["matrices"][module]["shape"]) for module in modules)
        for module in modules:
            assert float(rows[module][3].removesuffix(" %")) == pytest.approx(100 * stored / whole, abs=0.051)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_files(results: dict[str, Path], dense: Path, name: str) -> None:
    rows = cells(table_of(page_of(results[name]), "sizes"))
    numbers = {row[0]: [int(text.replace(",", "")) for text in row[3:5]] for row in rows}
    before, after = read_weights(dense), read_weights(results[name])
    floats = [sum(tensor.numel() for tensor in one.values() if tensor.is_floating_point()) for one in (before, after)]
    assert numbers.pop("whole model") == floats
    assert [sum(column) for column in zip(*numbers.values(), strict=True)] == floats
    for kind, (old, new) in numbers.items():
        if kind == "everything else":
            continue
        if name != "shared":  # there a kind is a part of a tensor
            assert old == sum(t.numel() for key, t in before.items() if key.endswith(f"{kind}.weight"))
        new_weights = [t for key, t in after.items() if f".{kind}." in key and key.endswith("weight")]
        assert new == sum(t.numel() for t in new_weights)
    record = record_of(results[name])
    kinds = record["kinds"]
    for kind, words in ((row[0], row[6]) for row in rows[:-2]):
        ranks = [matrix["rank"] for module, matrix in record["matrices"].items() if module.endswith(f".{kind}")]
        dense = sum(module.endswith(f".{kind}") for module in record["dense_targets"])
        lowest, *_, highest = sorted({min(ranks, default=0), max(ranks, default=0)}) * 2
        said = "dense" if not ranks else f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
        assert words == (f"{said}, {dense} dense" if ranks and dense else said)
    assert sum(kind["matrices"] for kind in kinds.values()) == len(TARGETS) + (6 if name == "shared" else 0)
    for kind, sizes in kinds.items():
        tensors = [t for key, t in after.items() if f".{kind}." in key and not key.endswith("bias")]
        assert sizes["bytes"]["after"] == sum(t.numel() * t.element_size() for t in tensors)


def test_maps(results: dict[str, Path]) -> None:
    """A cell for every matrix at its layer and kind, with its rank, and darker where more is kept."""
    folder = results["some dense"]
    record, page = record_of(folder), page_of(folder)
    (drawn,) = (table for table in page.named("ranks").all("table"))
    heads = [head.text for head in next(drawn.all("thead")).all("th")]
    assert heads == ["layer", "0", "1", "2", "kept, %"]
    seen = 0
    for row in next(drawn.all("tbody")).children:
        kind, *layers, _ = row.children
        for layer, cell in enumerate(layers):
            module = f"layers.{layer}.{kind.text}"
            seen += 1
            assert (cell.attributes["title"] or "").startswith(f"{module}: ")
            if module in record["dense_targets"]:
                assert cell.classes == {"dense"}
                continue
            matrix = record["matrices"][module]
            share = sum(parameters(folder, module)) / math.prod(matrix["shape"])
            assert cell.text == str(matrix["rank"])
            assert cell.classes == {f"k{min(int(10 * share), 9)}"}
    assert seen == len(TARGETS)


def test_lost(results: dict[str, Path]) -> None:
    """By kind lowest, median, highest, and where; the predicted losses of the map are shares of their sum."""
    record, page = record_of(results["calibrated"]), page_of(results["calibrated"])
    tables = list(page.named("lost").all("table"))
    fields = ["predicted_loss", "output_error", "relative_error"]
    assert len(tables) == 2 * len(fields)
    for field, drawn, summary in zip(fields, tables[::2], tables[1::2], strict=True):
        for kind, _, low, middle, high, worst in cells(summary):
            values = {m: one[field] for m, one in record["matrices"].items() if m.endswith(f".{kind}")}
            assert near(low, min(values.values()))
            assert near(middle, median(values.values()))
            assert near(high, max(values.values()))
            assert values[worst] == max(values.values())
        whole = record["predicted_loss"] if field == "predicted_loss" else 1.0
        for kind, *layers, _ in cells(drawn):
            for layer, text in enumerate(layers):
                matrix = record["matrices"].get(f"layers.{layer}.{kind}")
                assert (text == "dense") == (matrix is None)
                if matrix is not None:
                    exact = 100 * matrix[field] / whole
                    assert abs(float(text) - exact) < (0.051 if whole != 1.0 and exact < 9.9 else 0.51)


def test_losses_of_the_model(results: dict[str, Path]) -> None:
    record, page = record_of(results["calibrated"]), page_of(results["calibrated"])
    rows = {row[0]: row[2:] for row in cells(table_of(page, "loss"))}
    for name in ("measured", "predicted"):
        added, perplexity = rows[name]
        assert near(added, record[f"{name}_loss"])
        exact = math.exp(record["dense_loss"] + record[f"{name}_loss"])
        assert float(perplexity.replace(",", "")) == pytest.approx(exact, abs=0.006)
    assert "loss" not in {node.attributes.get("id") for node in page_of(results["shared"]).all("section")}


def test_how_it_was_made(results: dict[str, Path], dense: Path) -> None:
    record, page = record_of(results["calibrated"]), page_of(results["calibrated"])
    (command,) = page.named("making").all("pre")
    card = (results["calibrated"] / "README.md").read_text(encoding="utf-8")
    assert f"```\n{command.text}\n```" in card
    assert "[`report.html`](report.html)" in card
    assert command.text.startswith(f"svdconvert {dense.name} ")
    text = page.text
    for word in (
        "kfac",
        "pivoted",
        "gpt_neox",
        *record["versions"].values(),
        f"{record['settings']['tokens']:,} tokens",
    ):
        assert word in text, word
    times = {row[0]: row for row in cells(table_of(page, "time"))}
    assert set(record["timing"][0]) <= set(times)
    assert "--refit sequential" in next(page.all("aside")).text, "the next step, in words of the command line"
    assert "--calib" in next(page_of(results["shared"]).all("aside")).text


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_nothing_and_may_ask_for_nothing(results: dict[str, Path], name: str) -> None:
    page = page_of(results[name])
    for node in page.all():
        assert node.name not in {"script", "link", "iframe", "object", "img", "base", "form", "audio", "video"}
        assert not LOADING & set(node.attributes)
        assert "style" not in node.attributes
        assert not [key for key in node.attributes if key.startswith("on")]
        if "href" in node.attributes:
            page.named((node.attributes["href"] or "").removeprefix("#"))
    (style,) = page.all("style")
    assert not re.search(r"url\(|@import|@font-face", style.text)
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    (policy,) = (n for n in page.all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    order = [node.name for node in next(page.all("head")).children]
    assert order.index("meta") < order.index("style"), "the policy comes before what it is for"


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_read_aloud(results: dict[str, Path], name: str) -> None:
    page = page_of(results[name])
    assert page.attributes["lang"] == "en"
    assert [int(node.name[1]) for node in page.all() if re.fullmatch(r"h\d", node.name)][:2] == [1, 2]
    for table in page.all("table"):
        assert next(table.all("caption")).text
        assert all(head.attributes.get("scope") in ("row", "col") and head.text for head in table.all("th"))
        widths = {sum(1 for cell in row.children) for row in table.all("tr")}
        assert len(widths) == 1, "rows are equally long"
    for section in page.all("section"):
        assert page.named(section.attributes["aria-labelledby"] or "").name == "h2"
    for box in (node for node in page.all("div") if "box" in node.classes):
        assert box.attributes["tabindex"] == "0"
        assert box.attributes["role"] == "region"
        assert box.attributes["aria-label"]
    assert all(drawing.attributes["aria-hidden"] == "true" for drawing in page.all("svg"))
    identities = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(identities) == len(set(identities))


def test_the_same_record_gives_the_same_page(results: dict[str, Path], tmp_path: Path) -> None:
    """Written by the conversion, by the command, and in another place."""
    for name in NAMES:
        copy = Path(shutil.copytree(results[name], tmp_path / "somewhere else" / name))
        first = (copy / "report.html").read_bytes()
        (copy / "report.html").unlink()
        assert report(copy).read_bytes() == first
        assert report(copy, tmp_path / "page.html").read_bytes() == first


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(dark: bool) -> None:
    """Text on every ground that it stands on."""
    (style,) = parse(document("t", [element("header")], made_of="it")).all("style")
    found = rules(style.text, dark)
    shades = {name: said for name, said in found.items() if re.fullmatch(r"\.[kl]\d", name)}
    assert len(shades) == 20
    assert all(contrast(said["color"], said["background"]) >= 4.5 for said in shades.values())
    root = found[":root"]
    for ground in ("--paper", "--raised"):
        for ink in ("--ink", "--soft", "--blue"):
            assert contrast(root[ink], root[ground]) >= 4.5, (ink, ground)
        assert contrast(root["--orange"], root[ground]) >= 3, "of drawings"
    assert all(contrast(found[f".s{series}"]["color"], root["--paper"]) >= 3 for series in range(SERIES))
    assert found[".box"]["position"] == "relative", "else the page is wider than a phone"
    # Shades of a scale are told apart by lightness alone.
    for scale in "kl":
        steps = [contrast(shades[f".{scale}{step}"]["background"], root["--paper"]) for step in range(10)]
        assert steps == sorted(steps)
        assert min(b / a for a, b in pairwise(steps)) > 1.1


def test_dark_rules_are_for_screens() -> None:
    """Paper is light whatever the reader's screen is, and no rule stands in the style twice to make it so."""
    (style,) = parse(document("t", [element("header")], made_of="it")).all("style")
    queries = re.findall(r"@media ([^{]*dark[^{]*)\{", style.text)
    assert queries
    assert all(query.startswith("screen and ") for query in queries)
    shades = re.findall(r"^\.[kls]\d \{.*\}$", style.text, re.MULTILINE)
    assert len(shades) == len(set(shades)) == 2 * (20 + SERIES)
