"""The benchmark of the fast solver, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .measure import ROOT


def test_benchmark(tmp_path: Path) -> None:
    options = ["--hidden", "160", "--ranks", "8", "0", "--spectrum", "gauss", "steep", "--repeats", "1"]
    line = [sys.executable, "-m", "tests.benchmarks.filtered", *options, "--out", str(tmp_path)]
    subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
    rows = json.loads((tmp_path / "filtered.json").read_text())["rows"]
    assert len(rows) == 2 * 4 * 2
    assert {row["certified"] for row in rows if row["spectrum"] == "gauss"} == {True}
    for row in rows:
        assert row["excess"] <= (row["certificate"] or 0) + 1e-5
        assert row["certified"] == (row["certificate"] is not None)
        assert min(row["exact_s"], row["filtered_s"]) > 0
    assert "2048" not in (tmp_path / "filtered.md").read_text().splitlines()[4]
