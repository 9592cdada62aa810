"""Whatever call fails, and wherever: one sentence, and the same command then gives the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.failing_disk import KINDS, FailingDisk, Fault, compiled
from support.jobs import commands, result, write_inputs

from svdconvert.jobs.own_files import JOB_FOLDER

# Kinds of faults by kind of call.
FAULTS = {
    "write": [("fail", errno.EIO), ("fail", errno.ENOSPC), ("short", 0), ("full", 0)],
    "pwrite": [("fail", errno.EIO), ("fail", errno.EDQUOT), ("short", 0), ("full", 0)],
    "open": [("fail", errno.EIO), ("full", 0)],
    "mkdir": [("fail", errno.EIO), ("full", 0), ("late", errno.EIO)],
    "ftruncate": [("fail", errno.EIO), ("full", 0)],
    "fallocate": [("fail", errno.EIO), ("full", 0)],
    "fsync": [("fail", errno.EIO), ("fail", errno.ENOSPC)],
    "rename": [("fail", errno.EIO), ("fail", errno.ENOSPC), ("late", errno.EIO)],
    "close": [("fail", errno.EIO), ("fail", errno.ENOSPC)],
    "unlink": [("fail", errno.EIO), ("late", errno.EIO)],
    "rmdir": [("fail", errno.EIO), ("late", errno.EIO)],
}


@dataclass(frozen=True)
class Case:
    """A command and its undisturbed result.

    Attributes:
        args: its words; the folder it writes comes behind them.
        expected: files of the result, by name.
        counts: calls that it takes, by kind.
    """

    args: list[object]
    expected: dict[str, Any]
    counts: dict[str, int]

    def points(self) -> list[Fault]:
        """Every call, with every fault that is possible there."""
        return [
            Fault(kind, at, what, error)
            for kind in KINDS
            for at in range(1, self.counts[kind] + 1)
            for what, error in FAULTS[kind]
        ]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingDisk]:
    folder = tmp_path_factory.mktemp("disk")
    found = FailingDisk(folder, compiled(folder))
    yield found
    found.close()


@pytest.fixture(scope="module")
def cases(disk: FailingDisk, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every command, undisturbed."""
    found = {}
    for name, args in commands(write_inputs(tmp_path_factory.mktemp("inputs"))).items():
        out = tmp_path_factory.mktemp("expected") / "out"
        done = disk.run([*args, out], out)
        assert (done.status, done.err) == (0, ""), (name, done)
        assert not (out / JOB_FOLDER).exists(), name
        found[name] = Case(args, result(out), dict(done.seen))
    return found


def check(disk: FailingDisk, case: Case, fault: Fault, out: Path) -> None:
    """Run with a fault, look, run again, compare."""
    failed = disk.run([*case.args, out], out, fault)
    there = result(out) if out.exists() else {}
    if fault.what == "kill":
        assert failed.status in (-signal.SIGKILL, 0), failed
    elif failed.status == 0:
        assert there == case.expected, "it says that all is well, but it is not"
    else:
        assert failed.status == 1, failed
        assert failed.err.startswith("Error: "), failed
        assert failed.err.count("\n") == 1, failed
        sentence = failed.err
        assert "run the same command to continue" in sentence or "the same command" in sentence, sentence
    if "config.json" in there and "config.json" in case.expected:
        assert there.items() >= case.expected.items(), "a model that is not whole"
    again = disk.run([*case.args, out], out)
    assert (again.status, again.err) == (0, ""), (failed, again)
    assert result(out) == case.expected, failed
    assert not (out / JOB_FOLDER).exists()
    hidden = [path.name for path in out.rglob(".*")]
    assert not hidden, hidden


def sample(cases: dict[str, Case], count: int, seed: int, *, kills: bool = False) -> list[tuple[str, Fault]]:
    """Points over all commands and all kinds of calls, as evenly as there are such."""
    generator = random.Random(seed)
    pools: dict[tuple[str, str], list[Fault]] = {}
    for name, case in cases.items():
        for fault in case.points():
            pools.setdefault((name, fault.kind), []).append(fault)
    for pool in pools.values():
        generator.shuffle(pool)
    found: list[tuple[str, Fault]] = []
    while len(found) < count and any(pools.values()):
        for (name, _), pool in sorted(pools.items(), key=lambda item: generator.random()):
            if pool and len(found) < count:
                fault = pool.pop()
                found.append((name, replace(fault, what="kill") if kills else fault))
    return found


def test_the_calls_are_seen(cases: dict[str, Case]) -> None:
    """The rest is worth something only if the library stands before what the commands call."""
    for name, case in cases.items():
        kinds = {"open", "write", "fsync", "rename", "close", "mkdir"}
        kinds |= set() if name == "calibrate" else {"pwrite", "fallocate", "ftruncate"}
        assert all(case.counts[kind] for kind in kinds), (name, case.counts)
    assert sum(len(case.points()) for case in cases.values()) > 2000


def run_all(disk: FailingDisk, cases: dict[str, Case], points: list[tuple[str, Fault]], folder: Path) -> None:
    wrong = []
    for number, (name, fault) in enumerate(points):
        try:
            check(disk, cases[name], fault, folder / str(number) / "out")
        except AssertionError as error:
            wrong.append(f"{name}, {fault}: {error}")
            print(wrong[-1], flush=True)
    assert not wrong, f"{len(wrong)} of {len(points)}:\n" + "\n\n".join(wrong[:20])


def test_some_failures(disk: FailingDisk, cases: dict[str, Case], tmp_path: Path) -> None:
    run_all(disk, cases, sample(cases, 24, seed=0), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_failures(disk: FailingDisk, cases: dict[str, Case], tmp_path: Path) -> None:
    run_all(disk, cases, sample(cases, 360, seed=1), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_kills(disk: FailingDisk, cases: dict[str, Case], tmp_path: Path) -> None:
    run_all(disk, cases, sample(cases, 300, seed=2, kills=True), tmp_path)


@pytest.mark.parametrize(
    "lacks", ["flock", "lockd", "fallocate", "folder-sync", "file-sync folder-sync", "open-rename"]
)
def test_mounts_that_lack_something(lacks: str, disk: FailingDisk, cases: dict[str, Case], tmp_path: Path) -> None:
    for name in ("plain", "calibrate"):
        out = tmp_path / name / "out"
        done = disk.run([*cases[name].args, out], out, lacks=lacks)
        assert (done.status, done.err) == (0, ""), done
        assert result(out) == cases[name].expected
        assert not (out / JOB_FOLDER).exists()
        assert not list(out.rglob(".*"))
        # killed in between, and continued
        out = tmp_path / name / "killed"
        kind = "pwrite" if name == "plain" else "rename"
        killed = disk.run([*cases[name].args, out], out, Fault(kind, 4, "kill"), lacks=lacks)
        assert killed.status == -signal.SIGKILL, killed
        again = disk.run([*cases[name].args, out], out, lacks=lacks)
        assert (again.status, again.err) == (0, ""), again
        assert result(out) == cases[name].expected


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_short_journal_is_no_loss(first: int, disk: FailingDisk, cases: dict[str, Case], tmp_path: Path) -> None:
    """The disk fills while a record is written, and is freed: nothing that was finished becomes zeros."""
    case = cases["plain"]
    for at in range(first, case.counts["write"] + 1, 2):
        check(disk, case, Fault("write", at, "full"), tmp_path / str(at) / "out")


def test_umask(disk: FailingDisk, cases: dict[str, Case], tmp_path: Path) -> None:
    for name in ("plain", "kfac, refit", "calibrate"):
        for umask in (0o002, 0o077):
            out = tmp_path / f"{name}-{umask}"
            assert disk.run([*cases[name].args, out], out, umask=umask).status == 0
            modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
            assert set(modes.values()) == {0o666 & ~umask}, modes
