"""What a plan and a result say about what to do next."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from svdconvert import Calibration, convert, plan
from svdconvert.cli.report import show_plan, show_result
from svdconvert.planning.advice import WITHOUT_A_TEXT
from svdconvert.settings.told import told as in_options


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=2000)


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_plan_without_a_text_warns(dense: Path, console: Console) -> None:
    show_plan(console, plan(dense, rank=16), None)
    assert f"note: {in_options(WITHOUT_A_TEXT)}" in told(console)


def test_a_plan_with_one_does_not(dense: Path, console: Console) -> None:
    show_plan(console, plan(dense, rank=16, method="whiten"), None)
    assert in_options(WITHOUT_A_TEXT) not in told(console)


def test_a_plain_result(dense: Path, tmp_path: Path, console: Console) -> None:
    show_result(console, convert(dense, tmp_path / "a b", rank=16, device="cpu", check=False))
    assert f"{in_options(WITHOUT_A_TEXT)}; measure it: svdconvert evaluate '{tmp_path / 'a b'}' --text FILE" in told(
        console
    )


@pytest.mark.parametrize("refit", ["none", "sequential"])
def test_a_calibrated_result(refit: str, dense: Path, tmp_path: Path, console: Console) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a tiger.\n\n" * 200)
    calibration = Calibration(text, samples=8, length=32)
    show_result(
        console,
        convert(dense, tmp_path / "out", keep=0.5, calibration=calibration, refit=refit, device="cpu", check=False),
    )
    assert "destroyed" not in told(console)
    assert "--against MODEL" in told(console)
    assert ("--refit sequential may win back some" in told(console)) == (refit == "none")
    assert "svdconvert heal" in told(console)
