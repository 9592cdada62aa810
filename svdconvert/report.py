"""What the user sees: plan and result as tables, progress as a bar on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from svdconvert.events import Events
from svdconvert.steps import Step

if TYPE_CHECKING:
    from svdconvert.ablation import GroupResult
    from svdconvert.conversion import Report
    from svdconvert.job import Outcome
    from svdconvert.perplexity import Evaluation
    from svdconvert.planning import Plan
    from svdconvert.verification import Check


def size(count: float) -> str:
    """Bytes in decimal units, as the Hub counts."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def show_plan(console: Console, plan: Plan, free: int | None) -> None:
    """Print what a conversion would do.

    Args:
        console: where to.
        plan: the conversion.
        free: room on the disk of the output folder, or None where there is none.
    """
    commit = f" @ {plan.commit[:12]}" if plan.commit else ""
    console.print(f"[bold]{escape(plan.source)}[/]{commit} ({plan.architecture}), method {plan.method}")
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "shape", "matrices", "rank", "break-even", "parameters", "kept"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("target", "shape") else "right")
    for group in plan.groups:
        table.add_row(
            group.name,
            f"{group.shape[0]} x {group.shape[1]}",
            str(group.count),
            group.rank,
            f"{group.break_even:,.1f}",
            f"{group.dense_params:,} -> {group.params:,}",
            f"{group.params / group.dense_params:.1%}",
        )
    console.print(table)
    trained = plan.training_bytes
    rows = [
        (
            "parameters",
            f"{plan.params_before:,} -> {plan.params_after:,} ({plan.params_after / plan.params_before:.1%})",
        ),
        ("weight files", f"{size(plan.bytes_before)} -> {size(plan.bytes_after)} in {len(plan.shards)}"),
        ("full fine-tuning, AdamW", f"{size(trained[0])} -> {size(trained[1])} (16 bytes a parameter, no activations)"),
        ("peak memory of the conversion", f"about {size(plan.peak_bytes)}"),
    ]
    if free is not None:
        rows.append(("disk", f"{size(plan.bytes_after)} needed, {size(free)} free"))
    show_pairs(console, rows)
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def show_result(console: Console, report: Report) -> None:
    """Print what a conversion did."""
    plan, outcome, errors = report.plan, report.outcome, report.errors
    resumed = f", {outcome.resumed} matrices of them by an earlier run" if outcome.resumed else ""
    rows = [
        ("parameters", f"{plan.params_before:,} -> {plan.params_after:,}"),
        ("weight files", f"{size(plan.bytes_before)} -> {size(plan.bytes_after)}"),
    ]
    if errors:
        worst = max(report.matrices, key=lambda name: report.matrices[name]["relative_error"])
        mean = sum(errors) / len(errors)
        rows.append(("relative error", f"mean {mean:.4f}, worst {max(errors):.4f} ({worst}){resumed}"))
    rows += _times(outcome)
    memory = size(outcome.peak_memory_bytes)
    if outcome.peak_device_bytes:
        memory += f" on the host, {size(outcome.peak_device_bytes)} on the GPU"
    rows.append(("peak memory", memory))
    rows += [("checked", check) for check in outcome.checks]
    rows.append(("written to", str(report.folder)))
    if report.url:
        rows.append(("pushed to", report.url))
    show_pairs(console, rows)


def show_evaluation(console: Console, result: Evaluation) -> None:
    """Print a perplexity with all that it depends on."""
    show_pairs(
        console,
        [
            ("perplexity", f"{result.perplexity:.4f} per token"),
            ("bits per character", f"{result.bits_per_character:.4f}"),
            ("text", f"{result.text}: {result.tokens:,} tokens, {result.characters:,} characters"),
            ("window, stride", f"{result.window}, {result.stride} tokens"),
            ("parameters", f"{result.parameters:,}"),
            ("computed in", f"{result.dtype} on {result.device}, {result.seconds:.1f} s"),
        ],
    )


def show_outcome(console: Console, outcome: Outcome) -> None:
    """Print what a densify or fold did."""
    show_pairs(
        console,
        [
            ("parameters", f"{outcome.record['params']:,}"),
            *_times(outcome),
            ("peak memory", size(outcome.peak_memory_bytes)),
            *(("checked", check) for check in outcome.checks),
            ("written to", str(outcome.folder)),
        ],
    )


def _times(outcome: Outcome) -> list[tuple[str, str]]:
    """The whole and its stages; those that took no time worth telling are left out."""
    rows = [("time", f"{outcome.seconds:.1f} s")]
    if outcome.already_done:
        return rows
    for number, stages in enumerate(processes := outcome.record["timing"]):
        told = [
            f"{stage} {spent['wall_seconds']:.1f} s (CPU {spent['cpu_seconds']:.1f} s)"
            for stage, spent in stages.items()
            if max(spent.values()) >= 0.05
        ]
        if told:
            rows.append(("stages" if len(processes) == 1 else f"stages of process {number}", ", ".join(told)))
    return rows


def show_ablation(console: Console, results: Sequence[GroupResult]) -> None:
    """Print an ablation, the untouched model first."""
    table = Table(box=None, pad_edge=False)
    for heading in ("group", "singular values", "energy", "perplexity", "added log-perplexity"):
        table.add_column(heading, justify="right", no_wrap=True)
    dense = results[0].perplexity
    table.add_row("none", "", "", f"{dense:.2f}", "")
    for row in results[1:]:
        place = f"{row.first:.0%} to {row.last:.0%}"
        added = f"{math.log(row.perplexity / dense):+.4f}"
        table.add_row(str(row.group), place, f"{row.energy:.2%}", f"{row.perplexity:.2f}", added)
    console.print(table)


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """Print checks, one a line."""
    for check in checks:
        mark = "[green]ok[/]    " if check.passed else "[red]failed[/]"
        console.print(f"{mark} [bold]{check.name}[/]: {escape(check.detail)}")


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields a function of (done, in all)."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_pairs(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(table)


class TerminalEvents(Events):
    """Progress of a job: a bar with the matrix in work on a terminal, else a line per weight file."""

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        """Show on this console; ``verbose`` adds a line per matrix."""
        self._console = console
        self._verbose = verbose
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[current]}"),
            console=console,
            # A matrix can take a minute; the default window forgets the speed in between.
            speed_estimate_period=600,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("factors", total=None, current="", start=False)

    def __enter__(self) -> TerminalEvents:
        """Nothing is drawn before :meth:`begin`."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away."""
        self._progress.stop()

    def planned(self, plan: Plan, free: int) -> None:
        show_plan(self._console, plan, free)

    def begin(self, steps: Sequence[Step], done_before: int) -> None:
        if done_before:
            self.note(f"{done_before} matrices were done by an earlier run; going on with {len(steps)}")
        what = "decomposing" if any(step.kind == "decompose" for step in steps) else "factors"
        self._progress.reset(self._task, description=what, total=len(steps) + done_before, completed=done_before)
        self._progress.start()

    def solving(self, step: Step) -> None:
        self._progress.update(self._task, current=step.key)

    def decomposed(self, step: Step) -> None:
        self._progress.advance(self._task)

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        self._progress.advance(self._task)
        if not self._verbose:
            return
        parts = [step.key, f"rank {report['rank']}" if "rank" in report else step.kind]
        if "relative_error" in report:
            parts += [f"energy kept {report['energy_kept']:.4f}", f"relative error {report['relative_error']:.4f}"]
        self._print(", ".join([*parts, f"{report['seconds']:.2f} s"]))

    def shard(self, name: str, size_in_bytes: int) -> None:
        self._print(f"wrote {name} ({size(size_in_bytes)})")

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def _print(self, text: str) -> None:
        self._progress.console.print(escape(text), soft_wrap=True, highlight=False)
