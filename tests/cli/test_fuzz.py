"""Damaged files of every kind that is read, through the commands that read them (fuzz_*.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.fuzz_bases import TARGETED
from support.fuzz_mutations import mutate
from support.fuzz_process import CPU_SECONDS, MEMORY, Ended, problem_of

SENTENCE = "Error: m/config.json is not valid JSON; fetch it again\n"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they are; made by the first run."""
    return tmp_path_factory.mktemp("fuzz") / "bases"


def run_cases(bases: Path, first: int, count: int) -> list[dict[str, Any]]:
    """A process of its own: it forks, and must have no threads."""
    script = Path(__file__).parents[1] / "support" / "fuzz_process.py"
    line = [sys.executable, str(script), str(bases), str(first), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_sound(cases: list[dict[str, Any]]) -> None:
    wrong = [json.dumps(case, ensure_ascii=False, indent=1) for case in cases if case["problem"] is not None]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong[:10])


def test_150_cases(bases: Path) -> None:
    """Ended soon, with a result that is right or with one sentence, and nothing half."""
    cases = run_cases(bases, 0, 150)
    assert len(cases) == 150
    assert_sound(cases)
    # Damage that nobody notices, or that nothing survives, would show nothing.
    ended = [case["code"] for case in cases]
    assert ended.count(0) > 25
    assert ended.count(2) > 50
    assert {(case["base"], case["command"]) for case in cases} == {(t.base, t.command[0]) for t in TARGETED}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(150, 5150, 500))
def test_5000_cases(first: int, bases: Path) -> None:
    assert_sound(run_cases(bases, first, 500))


@pytest.mark.parametrize(
    ("ended", "problem"),
    [
        (Ended(0, "done", "", 1.0, 0), None),
        (Ended(2, "", SENTENCE, 1.0, 0), None),
        (Ended(-24, "", "", 10.0, 0), "killed by SIGXCPU"),
        (Ended(1, "", "Traceback (most recent call last):\n", 1.0, 0), "unforeseen"),
        (Ended(1, "", "Error: svdconvert failed unexpectedly (KeyError: 'a')\n", 1.0, 0), "unforeseen"),
        (Ended(70, "", "", 1.0, 0), "exit code 70"),
        (Ended(2, "", SENTENCE, 1.0, MEMORY + 1), "GB of memory"),
        (Ended(2, "", SENTENCE, CPU_SECONDS + 1.0, 0), "s of CPU"),
        (Ended(2, "", SENTENCE + SENTENCE, 1.0, 0), "no single sentence"),
        (Ended(2, "", "a warning\n" + SENTENCE, 1.0, 0), "no single sentence"),
        (Ended(0, "", "a warning\n", 1.0, 0), "something on stderr"),
        (Ended(1, "", "Error: out failed its check; please report this\n", 1.0, 0), "no sentence for users"),
    ],
)
def test_problems_are_seen(ended: Ended, problem: str | None) -> None:
    found = problem_of(ended)
    assert found is None if problem is None else problem in str(found)


def test_damage_follows_from_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    found = []
    for seed in (1, 1, 2):
        path.write_text(json.dumps({"hidden_size": 64, "layers": [1, 2, {"a": None}], "name": "tiny"}))
        found.append((mutate(path, Random(seed)), path.read_bytes()))
    assert found[0] == found[1] != found[2]
