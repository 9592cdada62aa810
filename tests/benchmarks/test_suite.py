"""The one command for all benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from . import __main__ as suite
from .measure import ROOT, machine, machine_line
from .test_pictures import content


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_runs_everything(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    line = [sys.executable, "-m", "tests.benchmarks", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "benchmarks.md").read_text()
    where = machine_line(json.loads((tmp_path / "solver-llm.json").read_text())["machine"])
    assert page.count(where) == 1
    assert done.stdout.startswith(where)
    for name in suite.ALL:
        assert machine_line(json.loads((tmp_path / f"{name}.json").read_text())["machine"]) == where
        table = (tmp_path / f"{name}.md").read_text()
        assert "\n| --- |" in table
        assert table.endswith(f"\n![{name}]({name}.png)\n")
        assert page.count(f"![{name}]({name}.png)") == 1
        assert content(tmp_path / f"{name}.png") > 8


def test_one_that_fails_keeps_no_other_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is said at the end, and the page has the others, with the machine once."""
    names, where = list(suite.ALL)[:3], machine_line(machine())

    def run(line: list[str], **more: object) -> SimpleNamespace:
        name = names[len(ran)]
        ran.append(name)
        (tmp_path / f"{name}.md").write_text(f"table of {name}\n\n{where}\n\n![{name}]({name}.png)\n")
        return SimpleNamespace(returncode=int(name == names[1]))

    ran: list[str] = []
    monkeypatch.setattr(suite.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--only", *names, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"these failed: {names[1]}$"):
        suite.main()
    assert ran == names
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.count(where) == 1
    assert [name for name in names if f"table of {name}\n\n\n![{name}]({name}.png)" in page] == [names[0], names[2]]
