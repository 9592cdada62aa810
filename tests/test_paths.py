"""Paths as users write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svdconvert import Calibration, InputError, convert, densify, evaluate, heal, plan, verify
from svdconvert.paths import user_path


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/model") == tmp_path / "model"
    assert user_path(Path("~")) == tmp_path
    assert user_path(tmp_path / "a~") == tmp_path / "a~"


@pytest.mark.parametrize("given", [None, 3, b"model", ["model"], "", True])
def test_what_is_no_path(given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one would be the working folder: that of a variable that a shell does not know."""
    monkeypatch.chdir(tmp_path)
    calls: list[Callable[[], object]] = [
        lambda: plan(given, rank=8),
        lambda: convert(given, "out", rank=8),
        lambda: convert("model", given, rank=8),
        lambda: evaluate(given, "text.txt"),
        lambda: evaluate("model", given),
        lambda: verify(given),
        lambda: densify(given, "out"),
        lambda: heal(given, "model", Calibration("text.txt"), "out"),
        lambda: Calibration(given),
    ]
    (tmp_path / "model").mkdir()
    for call in calls:
        with pytest.raises(InputError, match=r"is not a path; give|is empty; give|no text; give|has no config.json"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_home_that_is_not_there() -> None:
    name = "~nobody-of-that-name/model"
    assert user_path(name) == Path(name)
    with pytest.raises(InputError, match=f"there is no folder '{name}'"):
        plan(name, rank=8)
