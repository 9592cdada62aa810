"""Comparing two versions, with a program that takes no time in the place of svdconvert."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from . import against
from .against import OTHER, THIS, benchmark, cost, differences, markdown, with_sources

PROGRAM = """
import sys
from pathlib import Path
line = sys.argv[1:]
out = Path(line[line.index("--out") + 1])
out.mkdir()
(out / "model.safetensors").write_text({text})
(out / "config.json").write_text("{comment}")
"""


def git(repository: Path, *arguments: str) -> str:
    line = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(line, cwd=repository, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits of a program: the older writes its arguments, the newer writes the same unless they say ``fast``."""
    root = tmp_path / "repository"
    package = root / "svdconvert"
    package.mkdir(parents=True)
    git(root, "init", "--quiet")
    for tag, text in (("old", "' '.join(line[-2:])"), ("new", "' '.join(line[-2:]).replace('--rank 4', 'none')")):
        (package / "__main__.py").write_text(PROGRAM.format(text=text, comment=tag))
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", tag)
        git(root, "tag", tag)
    return root


SETTINGS = {"bundled": {"svd": "{model} --out {out} --rank 24", "fast": "{model} --out {out} --rank 4"}}


def test_what_differs_is_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version runs its own files; only the weights count."""
    monkeypatch.setattr(against, "SETTINGS", SETTINGS)
    (scratch := tmp_path / "scratch").mkdir()
    found = benchmark("old", ["bundled"], [], 2, scratch, repository)
    assert found["commit"] == git(repository, "rev-parse", "old")
    rows = found["models"]["bundled"]["rows"]
    assert [(row["setting"], row["files"], row["differ"]) for row in rows] == [
        ("svd", 1, []),
        ("fast", 1, ["fast/model.safetensors differs"]),
    ]
    configs = {side: (scratch / side / "svd" / "config.json").read_text() for side in (THIS, OTHER)}
    assert configs == {THIS: "new", OTHER: "old"}
    assert all(
        len(row["seconds"][side]) == 2 and min(row["seconds"][side]) > 0 for row in rows for side in (THIS, OTHER)
    )
    lines = markdown(found).splitlines()
    assert lines[4].startswith("| svd | 1 | yes |")
    assert lines[5].startswith("| fast | 1 | no |")
    assert "- fast: fast/model.safetensors differs" in lines


@pytest.mark.parametrize(("commit", "code"), [("old", 1), ("new", 0)])
def test_exit_code(
    commit: str,
    code: int,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(against, "SETTINGS", SETTINGS)
    monkeypatch.setattr(against, "ROOT", repository)
    line = ["against", commit, "--models", "bundled", "--repeats", "1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    if code:
        with pytest.raises(SystemExit) as stopped:
            against.main()
        assert stopped.value.code == code
    else:
        against.main()
    assert "| fast |" in capsys.readouterr().out
    assert (tmp_path / "out" / "against.json").is_file()


def test_unknown_commit(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such is no commit of this repository"):
        benchmark("no-such", ["bundled"], [], 1, tmp_path, repository)


def test_differences() -> None:
    this, other = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "3"}
    assert differences(this, other) == [
        "b differs",
        "c is written by this version only",
        "d is written by the other version only",
    ]


def test_cost_is_that_of_the_rounds() -> None:
    """A round in which the machine was slow for both does not count against either."""
    found = cost([2.0, 20.0, 2.2], [2.0, 20.0, 2.0])
    assert found == {THIS: 2.2, OTHER: 2.0, "ratio": 1.0, "lowest": 1.0, "highest": pytest.approx(1.1)}


def test_a_setting_takes_along_what_it_reads() -> None:
    settings = against.SETTINGS["bundled"]
    assert with_sources(["densify"], settings) == ["pivoted", "densify"]
    assert with_sources([], settings) == list(settings)
