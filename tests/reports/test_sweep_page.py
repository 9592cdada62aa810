"""The page of a sweep has the numbers of sweep.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.html_pages import Node, parse

from svdconvert import InputError, report
from svdconvert.commands.sweep_book import DENSE, Point, Setting
from svdconvert.reports.chart import Axis, linear, logarithmic, loss_axis

Run = Callable[..., SimpleNamespace]


def book(**changes: Any) -> dict[str, Any]:
    """What a sweep of three ways at three budgets writes."""
    dense = Point(DENSE, 4_211_712, 8_423_424, 84.5, 4.25, 0.0, None, 1.0, 0.0)
    points = []
    for i, (method, options) in enumerate(
        (("svd", ()), ("whiten", (("shrinkage", 0.0),)), ("kfac", (("shrinkage", 0.1),)))
    ):
        for keep in (0.8, 0.5, 0.2):
            setting = Setting(method, options, "pivoted", "uniform", keep)
            loss = (1 - keep) ** 3 / (i + 1)
            params = int(4_211_712 * (0.4 + keep / 2))
            points.append(Point(setting, params, 2 * params, 84.5 * math.exp(loss), 4.3, loss, None, 2.0, 0.9 * loss))
    return {
        "model": "owner/tiny",
        "text": "held <out>.txt",
        "settings": {},
        "calibration": None,
        "dense": dense.to_json(),
        "points": [point.to_json() for point in points],
        **changes,
    }


def page(folder: Path, document: dict[str, Any]) -> Node:
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(document))
    return parse(report(folder).read_bytes())


def test_every_point(tmp_path: Path) -> None:
    document = book()
    root = page(tmp_path / "sweep", document)
    (table,) = root.named("numbers").all("table")
    (body,) = table.all("tbody")
    rows = [[cell.text for cell in row.children] for row in body.children]
    assert rows[0][:3] == ["dense", "", "4,211,712"]
    assert len(rows) == 10
    for point, row in zip(document["points"], rows[1:], strict=True):
        assert row[0].startswith(f"{point['method']}, uniform, pivoted")
        assert row[1] == f"{100 * point['keep']:g}% kept"
        assert int(row[2].replace(",", "")) == point["params"]
        assert float(row[5]) == pytest.approx(point["perplexity"], abs=0.005)
        assert float(row[6]) == pytest.approx(point["added"], rel=5e-3, abs=6e-5)
        assert float(row[7]) == pytest.approx(point["kl"], rel=5e-3, abs=6e-5)
    assert rows[7][0] == "kfac, uniform, pivoted, shrinkage 0.1"
    assert "held <out>.txt" in root.text
    assert "best at 20% kept: kfac" in next(root.all("header")).text.replace("Best", "best")


def test_the_chart(tmp_path: Path) -> None:
    """A line for each way, lower where less is lost, and to the left where the model is smaller."""
    document = book()
    root = page(tmp_path / "sweep", document)
    (chart,) = (node for node in root.all("svg") if "chart" in node.classes)
    assert chart.attributes["role"] == "img"
    assert "KL(dense || model)" in chart.text
    lines = list(chart.all("g"))
    assert [line.classes for line in lines] == [{"s0"}, {"s1"}, {"s2"}]
    for line, points in zip(lines, (document["points"][i : i + 3] for i in (0, 3, 6)), strict=True):
        dots = [dot for dot in line.all("path") if "transform" in dot.attributes]
        places = [tuple(map(float, (dot.attributes["transform"] or "")[10:-1].split())) for dot in dots]
        for dot, point in zip(dots, points, strict=True):
            assert f"{point['params']:,} parameters" in dot.text
        xs, ys = zip(*places, strict=True)
        assert list(xs) == sorted(xs, reverse=True)
        assert list(ys) == sorted(ys, reverse=True), "further down is less"
    assert (
        len({dot.attributes["d"] for line in lines for dot in line.all("path") if "transform" in dot.attributes}) == 3
    )


def test_an_early_sweep(tmp_path: Path) -> None:
    """Without KL the added loss is drawn; without points there is no chart."""
    document = book()
    for point in document["points"]:
        del point["kl"]
    root = page(tmp_path / "sweep", document)
    assert "added log-perplexity, nats per token" in root.text
    assert "None" not in root.text
    alone = page(tmp_path / "sweep", book(points=[]))
    assert [node.attributes["id"] for node in alone.all("section")] == ["numbers"]


def test_the_command(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "sweep"
    page(folder, book())
    made = (folder / "sweep.html").read_bytes()
    (folder / "sweep.html").unlink()
    result = run("report", folder)
    assert (result.code, result.out) == (0, f"{folder / 'sweep.html'}\n")
    assert (folder / "sweep.html").read_bytes() == made
    (folder / "sweep.html").write_text("mine")
    refused = run("report", folder)
    assert refused.code == 2
    assert "sweep.html is there and is no page that svdconvert wrote" in refused.err.replace("\n", " ")
    assert (folder / "sweep.html").read_text() == "mine"
    (folder / "sweep.html").write_bytes(made)
    (folder / "sweep.json").write_text(json.dumps(book(dense=None)))
    result = run("report", folder)
    assert result.code == 2
    assert "finish the sweep first" in result.err
    (folder / "sweep.json").write_text(json.dumps(book(points=[{"method": 3}])))
    with pytest.raises(InputError, match=r"sweep.json is damaged: its 'points'"):
        report(folder)


finite = st.floats(1e-12, 1e12)


@given(st.lists(finite, min_size=1, max_size=8), st.booleans())
def test_axes(values: list[float], upwards: bool) -> None:
    """Every value is between the ends, in order, and there are few ticks, which are round."""
    ends = (300.0, 20.0) if upwards else (20.0, 300.0)
    axes: list[Axis] = [
        linear(values, *ends),
        logarithmic(values, *ends),
        replace(loss_axis(values), start=ends[0], end=ends[1]),
    ]
    for axis in axes:
        assert 2 <= len(axis.ticks) <= 26
        assert axis.low <= min(values) * (1 + 1e-9)
        assert axis.high >= max(values) * (1 - 1e-9)
        places = [axis.at(value) for value in sorted(values)]
        assert places == sorted(places, reverse=upwards)
        assert all(20 - 1e-6 <= place <= 300 + 1e-6 for place in places)
        assert {axis.at(axis.low), axis.at(axis.high)} == set(ends)
