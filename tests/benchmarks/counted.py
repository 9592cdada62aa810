"""Multiplications of a calibrated conversion on a device on which float64 is slow, by type and phase.

    python -m tests.benchmarks.counted MODEL --calib TEXT.txt --samples 4 8
    python -m tests.benchmarks.counted MODEL --calib TEXT.txt --samples 4 8 --reference    # float64 as elsewhere

Method kfac, a global budget, the pivoted layout, one worker, on the emulated device of the tests
(``tests/support/accelerator.py``), which says that float64 takes 64 times as long. What grows with the text is a
straight line in the number of sequences, so that two numbers tell what ``--tokens`` take.

Then every matrix of some blocks is decomposed and truncated by float64 as well, in the metrics that the conversion had,
and the weighted losses of both products are compared, in float64. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from svdconvert import Calibration, convert
from svdconvert.linalg.exact import decompose, truncate
from svdconvert.names import layer_number
from tests.support.accelerator import DEVICE, emulated, named, on_host, slow_float64
from tests.support.counting import Multiplications

from .harness import new_parser
from .measure import machine, machine_line, markdown_table, save

# What is counted under a name -> the functions of it; what lies within another one is counted there alone.
PHASES: Mapping[str, Sequence[str]] = {
    "passes": (
        "svdconvert.calibration.run.StatisticsRun._embed",
        "svdconvert.calibration.run.StatisticsRun._run_block",
        "svdconvert.calibration.run.StatisticsRun._run_experts",
        "svdconvert.calibration.run.StatisticsRun._differentiate",
    ),
    "Grams": ("svdconvert.calibration.grams.GramSum.add", "svdconvert.calibration.grams.GramSum.mean"),
    "head and loss": ("svdconvert.calibration.run.StatisticsRun._run_head",),
    "decomposing": ("svdconvert.factoring.decomposer.Decomposer.matrix",),
    "truncating": ("svdconvert.factoring.stacks.run",),
    "losses afterwards": ("svdconvert.factoring.measured.measure_losses",),
}
RANKS = (0.1, 0.3, 0.6, 0.9)
TYPES = ("float32", "float64")


@contextmanager
def counted_by_phase(counter: Multiplications) -> Iterator[None]:
    """Have the functions of :data:`PHASES` counted under their names."""

    def wrapped(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            with counter.during(phase):
                return function(*args, **kwargs)

        return within

    with ExitStack() as stack:
        for phase, places in PHASES.items():
            for place in places:
                stack.enter_context(patch(place, wrapped(resolve_name(place), phase)))
        yield


class Roads:
    """Weighted losses by both roads, of every matrix of some blocks."""

    def __init__(self, counter: Multiplications, every: int) -> None:
        """Begin with nothing.

        Args:
            counter: pauses meanwhile.
            every: of how many blocks one is compared; 0 for none.
        """
        self._counter, self._every = counter, every
        self.rows: list[dict[str, Any]] = []

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A decomposer's ``matrix``, after which both roads are compared."""

        def matrix(decomposer: Any, target: Any, statistics: Any) -> None:
            function(decomposer, target, statistics)
            if self._every and layer_number(target.module) % self._every == 0:
                paused, self._counter.paused = self._counter.paused, True
                weight = decomposer._weights(target, 0)[0]
                left, right, _ = decomposer._metrics(target, 0, statistics)
                self.rows += [{"module": target.module, **row} for row in compared(weight, left, right)]
                self._counter.paused = paused

        return matrix


def compared(weight: Tensor, left: Tensor, right: Tensor) -> Iterator[dict[str, float]]:
    """For several ranks, the loss of each road's product in the metrics, in float64, over the least possible one."""
    given = [tensor.clone() for tensor in (weight, left, right)]
    host = [on_host(tensor).clone() for tensor in given]
    ours, theirs = decompose(given[0], None, *given[1:]), decompose(host[0], None, *host[1:])
    for share in RANKS:
        rank = max(1, int(share * min(weight.shape)))
        found = {}
        for side, (tensors, decomposition) in {"slow": (given, ours), "float64": (host, theirs)}.items():
            factors = truncate(tensors[0], decomposition, rank, torch.float64, None, *tensors[1:])
            error = host[0].double() - on_host(factors.up) @ on_host(factors.down)
            found[side] = float(((host[1] @ error) * (error @ host[2])).sum())
        yield {"rank": rank, **found, "off": found["slow"] / found["float64"] - 1}


def conversion(options: argparse.Namespace, samples: int, *, every: int) -> dict[str, Any]:
    """One conversion.

    Returns:
        Multiplications by phase and type, and rows of :class:`Roads`.
    """
    counter = Multiplications()
    roads = Roads(counter, every)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch, ExitStack() as stack:
        stack.enter_context(slow_float64(1.0 if options.reference else 64.0))
        stack.enter_context(named("commands.convert"))
        stack.enter_context(counted_by_phase(counter))
        place = "svdconvert.factoring.decomposer.Decomposer.matrix"
        stack.enter_context(patch(place, roads.watch(resolve_name(place))))
        stack.enter_context(emulated(counter))
        outcome = convert(
            options.model, Path(scratch) / "out", keep=options.keep, method="kfac", layout="pivoted", workers=1,
            calibration=Calibration(str(options.calib), samples=samples, length=options.length), device=str(DEVICE),
        ).outcome  # fmt: skip
    found = {phase: {kind: counter.of(kind, phase) for kind in TYPES} for phase in (*PHASES, "")}
    return {"samples": samples, "phases": found, "roads": roads.rows, "loss": outcome.record.get("measured_loss")}


def line(runs: Sequence[Mapping[str, Any]], phase: str, kind: str, samples: float) -> float:
    """Multiplications with so many sequences, by the straight line through the first and the last run."""
    first, last = runs[0], runs[-1]
    low, high = (run["phases"][phase][kind] for run in (first, last))
    if first["samples"] == last["samples"]:
        return float(low)
    return float(low + (high - low) * (samples - first["samples"]) / (last["samples"] - first["samples"]))


def markdown(result: Mapping[str, Any]) -> str:
    """A table of phases, and what the roads differ by."""
    runs, length = result["runs"], result["length"]
    counts = [run["samples"] for run in runs]
    if len(counts) > 1:
        counts.append(result["tokens"] / length)
    rows = []
    for name in (*PHASES, "all"):
        cells = [name]
        for samples in counts:
            phases = (*PHASES, "") if name == "all" else (name,)
            single, double = (sum(line(runs, phase, kind, samples) for phase in phases) for kind in TYPES)
            whole = sum(line(runs, phase, kind, samples) for phase in (*PHASES, "") for kind in TYPES)
            cells += [f"{single / 1e9:,.1f}", f"{double / 1e9:,.2f}", f"{double / whole:.2%}"]
        rows.append(cells)
    heads = ["10^9 multiplications"]
    for samples in counts:
        heads += [f"{round(samples * length):,} tokens: float32", "float64", "of all"]
    lines = [
        f"{result['model']} at {result['keep']:.0%}, kfac, global, pivoted; sequences of {length} tokens.",
        "",
        markdown_table(heads, rows),
    ]
    off = sorted((abs(row["off"]), row["module"], row["rank"]) for run in runs for row in run["roads"])
    if off:
        worst = off[-1]
        middle = off[len(off) // 2][0]
        lines += [
            "",
            f"{len(off)} weighted losses, against float64's: {middle:.1e} off in the middle, {worst[0]:.1e} at most",
        ]
        lines[-1] += f" ({worst[1]}, rank {worst[2]})."
    return "\n".join([*lines, "", machine_line(result["machine"])])


def main() -> None:
    """Command line."""
    parser = new_parser("counted", repeats=1, scratch=True)
    parser.add_argument("model", type=Path, help="a dense model's folder")
    parser.add_argument("--calib", type=Path, required=True, help="its text")
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 8], help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=24_576, help="that the line is drawn to")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--compare", type=int, default=6, help="of so many blocks, one is compared; 0 for none")
    parser.add_argument("--reference", action="store_true", help="a device whose float64 is as fast as its float32")
    options = parser.parse_args()
    runs = [
        conversion(options, samples, every=options.compare if samples == options.samples[0] else 0)
        for samples in options.samples
    ]
    result = {
        "machine": machine(),
        "model": options.model.name,
        "keep": options.keep,
        "length": options.length,
        "tokens": options.tokens,
        "runs": runs,
    }
    save(options.out, f"counted-{options.model.name}", result, markdown(result))


if __name__ == "__main__":
    main()
