"""Calibration block by block: time and peak memory of its phases, on random weights and random tokens.

    python -m tests.benchmarks.calibration --layers 2                      # 1.3B geometry, 8,192 tokens, kfac
    python -m tests.benchmarks.calibration --layers 2 4 --method whiten
    python -m tests.benchmarks.calibration --hidden 512 --vocab 4096 --layers 2 4

Time and memory depend on shapes alone, so that tokens are drawn evenly from the vocabulary. Every model is calibrated
in a process of its own, in turn within each round, and its statistics are written as ``svdconvert calibrate`` writes
them. The highest resident memory is read anew for each phase (Linux). ``Gram sums`` is the part of the passes that
collects the statistics. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from svdconvert.methods.table import METHODS

from .geometry import Geometry
from .harness import add_sizes, chosen, new_parser, write_checkpoint
from .measure import machine, machine_line, markdown_table, run, save

# What is measured, as the table calls it -> the function of the calibration that does it.
PHASES = {
    "embeddings": "_embed",
    "forward, a block": "_run_block",
    "head and loss": "_run_head",
    "backward, a block": "_differentiate",
}
GRAMS = "Gram sums"
WRITING = "writing, a block"


class Phases:
    """Wall and CPU seconds and peak memory of every run of every phase."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.runs: dict[str, list[dict[str, Any]]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """One run of a phase."""
        _reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        run = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "peak_bytes": _peak()}
        self.runs.setdefault(name, []).append(run)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, measured."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.measure(name):
                return function(*args, **kwargs)

        return wrapped

    def add_up(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time alone is added up, within other phases."""
        (total,) = self.runs.setdefault(name, [{"wall_s": 0.0, "cpu_s": 0.0, "peak_bytes": None}])

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            total["wall_s"] += time.perf_counter() - wall
            total["cpu_s"] += time.process_time() - cpu
            return result

        return wrapped


def _reset_peak() -> None:
    """Let the kernel forget the highest resident memory of this process."""
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")


def _peak() -> int | None:
    place = Path("/proc/self/status")
    if not place.exists():
        return None
    lines = place.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measure(folder: Path, work: Path, method: str, tokens: int, length: int, batch: int) -> dict[str, Any]:
    """Calibrate a checkpoint in this process.

    Args:
        folder: dense checkpoint.
        work: for activations and statistics.
        method: what the statistics are for.
        tokens: of the text, in sequences of ``length``, ``batch`` of them at a time.
        length: see ``tokens``.
        batch: see ``tokens``.
    """
    import torch

    from svdconvert.calibration.folder import StatisticsFolder, statistics_key
    from svdconvert.calibration.grams import GramSum
    from svdconvert.calibration.run import StatisticsRun
    from svdconvert.calibration.text import CalibrationTokens
    from svdconvert.families.table import dense_architecture
    from svdconvert.methods.statistics import Needs
    from svdconvert.models.blocks import ModelBlocks
    from svdconvert.planning.targets import choose_targets
    from svdconvert.storage.source import LocalSource

    source = LocalSource(folder)
    vocabulary = int(source.config["vocab_size"])
    ids = torch.randint(vocabulary, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    text = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), 0, ids.numel())
    needs = Needs(**dict.fromkeys(METHODS[method].statistics, True))
    modules = [t.module for t in choose_targets(source.tensors, dense_architecture(source.config, source.name), ())]
    ModelBlocks(source)  # what is imported at the first use
    phases = Phases()
    with phases.measure("before it begins"):
        pass
    for name, function in PHASES.items():
        patch.object(StatisticsRun, function, phases.wrap(name, getattr(StatisticsRun, function))).start()
    for function in ("add", "mean"):
        patch.object(GramSum, function, phases.add_up(GRAMS, getattr(GramSum, function))).start()
    store = StatisticsFolder(work / "stats", statistics_key(source, text, needs), create=True)
    wall, cpu = time.perf_counter(), time.process_time()
    for block, found in StatisticsRun(source, text, needs, modules, work=work / "work", batch_size=batch):
        with phases.measure(WRITING):
            store.save(block, found)
        del found
    phases.runs[GRAMS] = phases.runs.pop(GRAMS)  # it is part of what comes before it in the table
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "statistics_bytes": sum(path.stat().st_size for path in (work / "stats").iterdir()),
        "phases": phases.runs,
    }


def benchmark(
    geometry: Geometry, layers: Sequence[int], method: str, tokens: int, length: int, batch: int, repeats: int
) -> dict[str, Any]:
    """Models of several depths.

    Args:
        geometry: the model.
        layers: how many.
        method, tokens, length, batch: see :func:`measure`.
        repeats: rounds.
    """
    rounds: dict[int, list[dict[str, Any]]] = {count: [] for count in layers}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            for count, runs in rounds.items():
                source = Path(scratch) / str(count)
                if not source.exists():
                    write_checkpoint(replace(geometry, layers=count), source)
                line = ["tests.benchmarks.calibration", "--measure", str(source), "--method", method]
                line += ["--tokens", str(tokens), "--length", str(length), "--batch", str(batch)]
                measured = run(line)
                runs.append(json.loads(measured.output) | {"others": round(measured.others, 3)})
    return {
        "machine": machine(),
        "model": geometry.name,
        "hidden": geometry.hidden,
        "vocab": geometry.vocab,
        "method": method,
        "tokens": tokens // length * length,
        "length": length,
        "batch": batch,
        "repeats": repeats,
        "runs": [{"layers": count, **together(runs)} for count, runs in rounds.items()],
    }


def together(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One model's rounds: medians of the whole, and all runs of every phase, beside how many are one round's."""
    middle = {key: median(one[key] for one in rounds) for key in ("wall_s", "cpu_s", "others")}
    first = rounds[0]
    return {
        **middle,
        **{key: first[key] for key in ("threads", "statistics_bytes")},
        "phases": {name: [run for one in rounds for run in one["phases"][name]] for name in first["phases"]},
        "times": {name: len(runs) for name, runs in first["phases"].items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """A table for each depth."""
    head = (
        f"Calibration for {result['method']}: {result['model']}, hidden size {result['hidden']:,}, vocabulary "
        f"{result['vocab']:,}; {result['tokens']:,} tokens in sequences of {result['length']:,}, {result['batch']} at "
        f"a time. Medians of {result['repeats']}; seconds of a phase that runs more than once are the median of one "
        "run, memory is the highest."
    )
    lines = [head, ""]
    for one in result["runs"]:
        rows = [_row(name, one["times"][name], runs) for name, runs in one["phases"].items()]
        every = [each for runs in one["phases"].values() for each in runs]
        rows.append(["all", "", f"{one['wall_s']:.2f}", f"{one['cpu_s']:.2f}", _peaks(every)])
        title = (
            f"{one['layers']} layers, {one['threads']} threads, statistics of {one['statistics_bytes'] / 1e6:,.0f} MB; "
            f"{one['others']:.0%} of the machine taken by others:"
        )
        lines += [title, "", markdown_table(["phase", "times", "wall s", "CPU s", "peak MB"], rows), ""]
    return "\n".join([*lines, machine_line(result["machine"])])


def _row(name: str, times: int, runs: Sequence[dict[str, Any]]) -> list[str]:
    seconds = [f"{median(one[clock] for one in runs):.2f}" for clock in ("wall_s", "cpu_s")]
    return [name, str(times), *seconds, _peaks(runs)]


def _peaks(runs: Sequence[dict[str, Any]]) -> str:
    """The highest memory of some runs in MB; nothing where it is not known."""
    known = [one["peak_bytes"] for one in runs if one["peak_bytes"]]
    return f"{max(known) / 1e6:,.0f}" if known else ""


def main() -> None:
    """Command line."""
    parser = new_parser("calibration", repeats=1)
    add_sizes(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[2], help="models of so many layers")
    parser.add_argument("--method", choices=[name for name, row in METHODS.items() if row.statistics], default="kfac")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences at a time")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the process that does the work
    options = parser.parse_args()
    settings = (options.method, options.tokens, options.length, options.batch)
    if options.measure:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(measure(options.measure, Path(work), *settings)))
        return
    geometry = chosen(options)
    result = benchmark(geometry, options.layers, *settings, options.repeats)
    save(options.out, f"calibration-{options.model}-{options.method}", result, markdown(result))


if __name__ == "__main__":
    main()
