"""Regular expressions from files: what peft's own matching finds, in bounded time."""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from svdconvert.commands import patterns
from svdconvert.commands.patterns import matching, suffixed
from svdconvert.errors import InputError

NAMES = [f"model.layers.{n}.{part}" for n in (0, 1, 12) for part in ("mlp.up_proj", "mlp.up", "self_attn.q_proj")]


@pytest.mark.parametrize(
    "pattern",
    [
        "up_proj",
        "mlp.up",
        "^model.layers.0.mlp.up",
        r"layers\.1\.mlp\.up_proj",
        r"layers\.\d+\.mlp\.up_proj",
        r".*\.q_proj",
        r"(mlp|self_attn)\.\w+",
        r"layers\.(0|12)\..*",
        "nothing",
    ],
)
def test_matches_as_peft_does(pattern: str) -> None:
    expected = {name for name in NAMES if re.match(rf"(.*\.)?({pattern})$", name)}
    found = matching([suffixed(pattern)], NAMES, "FILE")
    assert set(found) == expected
    assert (pattern == "nothing") == (not expected)


def test_the_first_pattern_counts() -> None:
    found = matching(["model.layers.0.mlp.up", r".*\.up", ".*"], NAMES, "FILE")
    assert found["model.layers.0.mlp.up"] == "model.layers.0.mlp.up"
    assert found["model.layers.1.mlp.up"] == r".*\.up"
    assert found["model.layers.1.mlp.up_proj"] == ".*"
    assert matching([], NAMES, "FILE") == {}


@pytest.mark.parametrize("pattern", ["(", "a**", "[z-a]", "x{3,1}", r"\1", "(?P<a>b)(?P<a>c)"])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(InputError, match=r"^FILE has a pattern that (is not a regular exp.* \(|cannot be matched)"):
        matching([pattern], NAMES, "FILE")


def test_long_patterns_are_refused() -> None:
    with pytest.raises(InputError, match="FILE has a pattern of 1,001 characters"):
        matching(["a" * 1001], NAMES, "FILE")


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matcher is made to sleep: what a pattern does is not what is tested."""
    monkeypatch.setattr(patterns, "MATCH_SECONDS", 0.2)
    monkeypatch.setattr(patterns, "_MATCHER", "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"FILE has patterns \(up\.\*\) that take more than 0\.2 s to match"):
        matching([suffixed("up.*")], NAMES, "FILE")
    assert time.monotonic() - start < 30


def test_plain_patterns_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert set(matching([suffixed(r"mlp\.up")], NAMES, "FILE")) == {name for name in NAMES if name.endswith("mlp.up")}
