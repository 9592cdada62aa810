"""Tables on terminals of 80 columns and fewer: nothing is cut, every number stands there whole."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from svdconvert import Evaluation, MatrixSpectrum, Spectra, Sweep, plan
from svdconvert.cli import report
from svdconvert.cli.progress import TerminalEvents
from svdconvert.cli.screen import console_for, print_json
from svdconvert.cli.tables import new_table, show_table
from svdconvert.commands.ablate import GroupResult
from svdconvert.commands.sweep_book import Point, Setting
from svdconvert.commands.verify import Check

BUNDLED = Path(__file__).parents[2] / "examples" / "tiny_polyglot" / "model"


def shown(width: int, show: Any, *args: Any, **options: Any) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=width), *args, **options)
    return stream.getvalue()


STRANGE = "a[red]\x1b[2J\x9b[b]:smile:\u202e\udc80"
SPELLED = "a[red]\\x1b[2J\\x9b[b]:smile:\\u202e\\udc80"


def test_names_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """They do not control the terminal, are no markup and no pictures, wherever a command prints them."""
    made = replace(plan(BUNDLED, rank=16), source=STRANGE, notes=(f"look at {STRANGE}",))
    made.__dict__["groups"] = [replace(kind, name=STRANGE) for kind in made.groups[:1]]
    show, evaluation = WIDE["evaluation"]()
    console = console_for(False)
    report.show_plan(console, made, 10**9)
    show(console, replace(evaluation, text=STRANGE, against=STRANGE))
    report.show_checks(console, [Check("weights", False, STRANGE)])
    with TerminalEvents(console) as events:
        events.note(STRANGE)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert "".join(out.split()).count(SPELLED) == 6
    print_json({STRANGE: [STRANGE]})
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable()
    assert json.loads(said) == {STRANGE: [STRANGE]}


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w.,%+:-]*\d[\w.,%+:-]*", text))


def spectra() -> Spectra:
    import numpy as np

    values = np.linspace(1, 0.01, 2048) ** 2
    matrices = tuple(
        MatrixSpectrum(f"layers.{i}.attention.query_key_value", (6144, 2048), values, np.linspace(1, 0, 2049))
        for i in range(3)
    )
    return Spectra("owner/a-model", None, "kfac", {"shrinkage": 0.2}, "balanced", None, matrices)


def sweep() -> Sweep:
    def point(method: str, keep: float | None) -> Point:
        setting = Setting(method, (("shrinkage", 0.15),) if method == "kfac" else (), "pivoted", "global", keep)
        return Point(setting, 1_331_810_304, 2_663_620_608, 123_456.78, 4.5, 3.1234, None, 1.0)

    return Sweep("m", "t", point("svd", None), [point(m, k) for m in ("svd", "kfac") for k in (0.8, 0.6)], Path("out"))


WIDE = {
    "plan": lambda: (report.show_plan, plan(BUNDLED, rank=72), 123_456_789_012),
    "plan with patterns": lambda: (
        report.show_plan,
        plan(BUNDLED, rank={"*": 72, "layers.0.*": 24, "layers.1.mlp.*": 180, "layers.2.*": 96}, split_fused=True),
        None,
    ),
    "spectrum": lambda: (report.show_spectra, spectra()),
    "sweep": lambda: (report.show_sweep, sweep()),
    "ablation": lambda: (
        report.show_ablation,
        [GroupResult(i, i / 10, (i + 1) / 10, 0.1, 123_456_789.12) for i in range(4)],
    ),
    "evaluation": lambda: (
        report.show_evaluation,
        Evaluation(
            **{
                field: {"str": "a-long-name-of-something", "int": 1_234_567, "float": 12.345678}.get(str(kind))
                for field, kind in Evaluation.__annotations__.items()
            }
        ),
    ),
    "checks": lambda: (report.show_checks, [Check("keys and shapes", True, "148 tensors of the shapes " * 5)]),
}


@pytest.mark.parametrize("width", [80, 60, 44])
@pytest.mark.parametrize("what", WIDE)
def test_nothing_is_cut(what: str, width: int) -> None:
    show, *args = WIDE[what]()
    wide, narrow = shown(400, show, *args), shown(width, show, *args)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= width
    if width >= 60:  # below, cells are folded
        assert words(wide) <= words(narrow), sorted(words(wide) - words(narrow))
    assert re.sub(r"\s", "", narrow).count("%") >= re.sub(r"\s", "", wide).count("%")


def test_pieces_repeat_what_names_a_row() -> None:
    table = new_table(("name",), [f"column {i}" for i in range(6)])
    table.add_row("first", *(str(1000 + i) for i in range(6)))
    table.add_row("second", *(str(2000 + i) for i in range(6)))
    lines = shown(40, show_table, table).splitlines()
    assert [line.split() for line in lines] == [
        "name column 0 column 1 column 2".split(),
        "first 1000 1001 1002".split(),
        "second 2000 2001 2002".split(),
        [],
        "name column 3 column 4 column 5".split(),
        "first 1003 1004 1005".split(),
        "second 2003 2004 2005".split(),
    ]
    assert len(shown(80, show_table, table).splitlines()) == 3


def test_the_plan_at_80_columns_reads_row_by_row() -> None:
    lines = shown(80, report.show_plan, plan(BUNDLED, rank=72), None).splitlines()
    table = lines[1 : lines.index("", 1)]
    assert [line.split()[0] for line in table] == [
        "target",
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]
    assert "576 x 192" in table[1]
