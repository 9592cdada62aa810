"""Runs seeded cases of the fuzzer, each in a fork of this process: `python tests/support/fuzz_process.py BASES FIRST
COUNT`.

Prints a JSON line per case. ``problem`` is null, or what the case shows to be wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

# A case may take so much CPU, and so much more memory than the process that it is forked from.
CPU_SECONDS = 10
MEMORY = 10**9
WALL_SECONDS = 120

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; negative is the signal that killed it.
        out, err: what it printed.
        seconds: CPU.
        memory: most resident bytes beyond those of the process that it was forked from.
    """

    code: int
    out: str
    err: str
    seconds: float
    memory: int


def run(command: Sequence[str], folder: Path, stop_after: int | None = None) -> Ended:
    """Run a command line in a folder, in a fork of this process.

    Args:
        command: arguments of svdconvert.
        folder: working folder.
        stop_after: end like a killed process after so many steps of a job.
    """
    streams = [folder / ".stdout", folder / ".stderr"]
    before = _resident()
    child = os.fork()
    if child == 0:
        _child(command, folder, streams, stop_after)
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    out, err = (stream.read_text(errors="replace") if stream.exists() else "" for stream in streams)
    for stream in streams:
        stream.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, out, err, used.ru_utime + used.ru_stime, max(used.ru_maxrss * 1024 - before, 0))


def _child(command: Sequence[str], folder: Path, streams: Sequence[Path], stop_after: int | None) -> None:
    code = 70
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder.parent)  # nothing is removed by a process that is killed or ends so abruptly
        for number, stream in enumerate(streams, 1):
            handle = os.open(stream.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 3 * MEMORY, size + 3 * MEMORY))
        if stop_after is not None:
            _stop_after(stop_after)
        from svdconvert.cli.app import main

        try:
            main(list(command))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - it is the test's finding
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _stop_after(steps: int) -> None:
    from svdconvert.jobs import shard_writer as shards

    shards.BATCH_SECONDS = 0.0  # every step is recorded
    finish, done = shards.ShardWriter.finish, [0]

    def stopping(self: shards.ShardWriter, *args: object) -> object:
        found = finish(self, *args)  # type: ignore[arg-type]
        done[0] += 1
        if done[0] == steps:
            os._exit(0)
        return found

    shards.ShardWriter.finish = stopping  # type: ignore[method-assign, assignment]


def _resident() -> int:
    """What a fork begins with: memory that is no file's."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize()


@contextlib.contextmanager
def copy_of(base: Path) -> Iterator[Path]:
    """A copy of a base, to be changed."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz_", dir=base.parent))
    try:
        yield Path(shutil.copytree(base, folder / "case"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def case(bases: Path, seed: int) -> dict[str, object]:
    """Damage a file, run the command that reads it, and look at how it ended."""
    from support.fuzz_bases import TARGETED
    from support.fuzz_mutations import mutate
    from support.fuzz_oracles import wrong_result

    random = Random(seed)
    target = random.choice(TARGETED)
    with copy_of(bases / target.base) as folder:
        patterns = list(target.files)
        random.shuffle(patterns)
        files = next(found for p in patterns if (found := sorted(f for f in folder.glob(p) if f.is_file())))
        file = random.choice(files)
        said = mutate(file, random)
        before = _names(folder, target.result)
        ended = run(target.command, folder)
        try:
            problem = problem_of(ended) or wrong_result(target, bases, folder, file, ended, before)
        except Exception as error:  # noqa: BLE001 - the reference cannot read what the command could
            problem = f"the result cannot be judged: {type(error).__name__} {error}"
    return {
        "seed": seed,
        "base": target.base,
        "file": str(file.relative_to(folder)),
        "command": target.command[0],
        "damage": said,
        "code": ended.code,
        "seconds": round(ended.seconds, 2),
        "memory": ended.memory,
        "error": ended.err.strip()[-2000:],
        "problem": problem,
    }


def _names(folder: Path, result: str | None) -> set[str]:
    return {path.name for path in (folder / result).glob("*")} if result else set()


def problem_of(ended: Ended) -> str | None:
    """What is wrong with how a command ended, whatever it was."""
    if ended.code < 0:
        name = signal.Signals(-ended.code).name
        return f"killed by {name} after {ended.seconds:.1f} s of CPU"
    if "Traceback" in ended.out + ended.err or "unexpectedly" in ended.err:
        return "unforeseen"
    if ended.code not in (0, 1, 2):
        return f"exit code {ended.code}"
    if ended.seconds > CPU_SECONDS:
        return f"{ended.seconds:.1f} s of CPU"
    if ended.memory > MEMORY or "out of memory" in ended.err:
        return f"{ended.memory / 1e9:.1f} GB of memory"
    errors = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    if ended.code and (len(errors) != 1 or ended.err != errors[0] + "\n"):
        return "no single sentence"
    if not ended.code and ended.err:
        return "something on stderr"
    if ended.code and re.search(r"Error: \S+Error\b|please report", ended.err):
        return "no sentence for users"
    return None


def main() -> None:
    """Make the bases if they are not there, and run cases."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.fuzz_bases import DENSE, EVALUATE, make_bases

    bases, first, count = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])

    def must(command: Sequence[str], folder: Path, stop_after: int | None) -> None:
        ended = run(command, folder, stop_after)
        assert ended.code == 0, (command, ended)

    if not (bases / "ready").exists():
        shutil.rmtree(bases, ignore_errors=True)
        bases.mkdir(parents=True)
        make_bases(bases, must)
        (bases / "ready").touch()
    _warm_up(bases, [("convert", base) for base in DENSE], EVALUATE)
    for seed in range(first, first + count):
        print(json.dumps(case(bases, seed), ensure_ascii=False), flush=True)


def _warm_up(bases: Path, runs: Sequence[tuple[str, str]], options: Sequence[str]) -> None:
    """Import what commands import, so that forks need not."""
    import gguf  # noqa: F401
    import scipy.linalg
    import torch

    import svdconvert
    from support.settled import settle
    from svdconvert.commands.evaluate import evaluate

    for module in pkgutil.walk_packages(svdconvert.__path__, "svdconvert."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    torch.set_num_threads(1)
    scipy.linalg.eigh([[1.0]])
    for _, base in runs:
        evaluate(bases / base / "m", bases / base / "text.txt", window=16, device="cpu")
    settle()


if __name__ == "__main__":
    main()
