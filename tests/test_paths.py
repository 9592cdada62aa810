"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdconvert import InputError, plan
from svdconvert.paths import user_path


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/model") == tmp_path / "model"
    assert user_path(Path("~")) == tmp_path
    assert user_path(tmp_path / "a~") == tmp_path / "a~"


def test_a_home_that_is_not_there() -> None:
    name = "~nobody-of-that-name/model"
    assert user_path(name) == Path(name)
    with pytest.raises(InputError, match=f"there is no folder '{name}'"):
        plan(name, rank=8)
