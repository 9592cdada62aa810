"""Killed at random moments, once or more: the same command then gives the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.forked import BATCH_BYTES, Forked
from support.jobs import commands, result, write_inputs

# How often a job records what it has done: after every step, every few, or as it does by itself.
BATCHES = (1, 20_000, 32_000_000)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    found = Forked(tmp_path_factory.mktemp("forked"))
    yield found
    found.close()


@dataclass(frozen=True)
class Case:
    """A command, the files of its undisturbed result, and how long that takes."""

    args: Sequence[object]
    expected: dict[str, object]
    seconds: float


@pytest.fixture(scope="module")
def cases(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder, found = tmp_path_factory.mktemp("undisturbed"), {}
    for name, args in commands(write_inputs(tmp_path_factory.mktemp("inputs"))).items():
        runs = [forked.run(*args, folder / f"{name}-{i}") for i in range(2)]  # the first one imports
        assert [ended.status for ended in runs] == [0, 0], runs
        expected = result(folder / f"{name}-0")
        assert expected == result(folder / f"{name}-1"), name
        assert expected
        found[name] = Case(args, expected, runs[1].seconds)
    return found


def kill_and_continue(forked: Forked, case: Case, out: Path, choice: random.Random) -> int:
    """Kill a command until a run may come to its end; returns how often it was killed."""
    killed = 0
    for _ in range(choice.choice((1, 1, 2, 3))):
        constants = {BATCH_BYTES: choice.choice(BATCHES)}
        ended = forked.run(*case.args, out, kill=choice.uniform(0.0, 1.1 * case.seconds), constants=constants)
        assert ended.status in (0, -signal.SIGKILL), ended
        killed += ended.status != 0
        finished = (out / "config.json").is_file()
        for name, whole in result(out).items() if out.exists() else ():
            if finished or name.endswith(".safetensors"):  # a final name is that of a whole file
                assert name.endswith(".tmp") or whole == case.expected[name], (case.args, name)
    again = forked.run(*case.args, out)
    assert (again.status, again.err) == (0, ""), (case.args, again)
    assert result(out) == case.expected, case.args
    return killed


def kill_all(forked: Forked, cases: dict[str, Case], folder: Path, runs: int) -> Counter[str]:
    """So many jobs killed, the kinds in turn; returns kills by kind."""
    choice, kills = random.Random(runs), Counter[str]()
    for i in range(runs):
        name = list(cases)[i % len(cases)]
        out = folder / str(i)
        kills[name] += kill_and_continue(forked, cases[name], out, choice)
        shutil.rmtree(out)
    return kills


def test_killed_at_random(forked: Forked, cases: dict[str, Case], tmp_path: Path) -> None:
    kills = kill_all(forked, cases, tmp_path, len(cases))
    assert sum(kills.values()) >= 5, kills


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_300_times(forked: Forked, cases: dict[str, Case], tmp_path: Path) -> None:
    kills = kill_all(forked, cases, tmp_path, 300)
    print(dict(kills), {name: round(case.seconds, 2) for name, case in cases.items()})
    assert sum(kills.values()) >= 150, kills
    assert all(kills[name] for name in cases), kills
