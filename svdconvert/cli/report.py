"""Plans and results as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from svdconvert.cli.tables import new_table, show_pairs, show_table
from svdconvert.jobs.record import REPORT
from svdconvert.machine.timing import StageTime
from svdconvert.methods.table import METHODS, calibrated, rough_guess
from svdconvert.nats import perplexity
from svdconvert.planning.advice import WITHOUT_A_TEXT, next_steps, unmeasured
from svdconvert.planning.target_kinds import widths_in_words
from svdconvert.settings.told import told
from svdconvert.solvers.table import SOLVERS
from svdconvert.words import size

if TYPE_CHECKING:
    from svdconvert.commands.ablate import GroupResult
    from svdconvert.commands.comparing import Check
    from svdconvert.commands.evaluate import Evaluation
    from svdconvert.commands.report import Report
    from svdconvert.commands.spectra import MatrixSpectrum, Spectra
    from svdconvert.commands.sweep_book import Sweep
    from svdconvert.jobs.job import Outcome
    from svdconvert.models.divergence import Divergence
    from svdconvert.planning.plan import Plan


_PICKS: Mapping[str, Callable[[Sequence[float]], float]] = {"lowest": min, "median": median, "highest": max}


def show_plan(console: Console, plan: Plan, free: int | None) -> None:
    """Print what a conversion would do.

    Args:
        console: where to.
        plan: the conversion.
        free: bytes free on the disk of the output folder, or None if unknown.
    """
    commit = f" @ {plan.commit[:12]}" if plan.commit else ""
    layers = plan.settings["share_layers"]
    users = f"{layers} layers" if layers > 1 else "the experts of a layer" if plan.settings.get("share_experts") else ""
    shared = f", input-side factors shared by {users}" if users else ""
    console.print(f"[bold]{escape(plan.source)}[/]{commit} ({plan.architecture}), method {plan.method}{shared}")
    bits = ("bits",) if plan.grids else ()
    table = new_table(("target", "shape"), ("matrices", "rank", *bits, "break-even", "parameters", "kept"))
    for group in plan.groups:
        table.add_row(
            group.name,
            f"{group.shape[0]} x {group.shape[1]}",
            str(group.count),
            group.rank,
            *([group.width or "16"] if bits else []),
            f"{group.break_even:,.1f}",
            f"{group.dense_params:,} -> {group.params:,}",
            f"{group.params / group.dense_params:.1%}",
        )
    show_table(console, table)
    trained = plan.training_bytes
    peak, worker = plan.peak_bytes(), plan.worker_bytes
    rows = [
        (
            "parameters",
            f"{plan.params_before:,} -> {plan.params_after:,} ({plan.params_after / plan.params_before:.1%})",
        ),
        ("weight files", f"{size(plan.bytes_before)} -> {size(plan.bytes_after)} in {len(plan.shards)}"),
        (
            "full fine-tuning, AdamW",
            f"{size(trained[0])} -> "
            + ("adapters alone" if plan.grids else f"{size(trained[1])} (16 bytes a parameter, no activations)"),
        ),
        ("peak memory of the conversion", f"about {size(peak)}, {size(worker)} more for every further worker"),
    ]
    if free is not None:
        rows.append(("disk", f"{size(plan.bytes_after)} needed, {size(free)} free"))
    if plan.healing is not None:
        memory, disk = size(plan.healing.memory_bytes), size(plan.healing.disk_bytes)
        rows.append(("healing", f"at least {memory} of memory, and meanwhile {disk} more of disk"))
    show_pairs(console, rows)
    notes = (*plan.notes, WITHOUT_A_TEXT) if unmeasured(METHODS[plan.method], plan.settings) else plan.notes
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(told(note))}")


def show_result(console: Console, report: Report) -> None:
    """Print what a conversion did."""
    plan, outcome, figures = report.plan, report.outcome, report.training_free
    matrices: Mapping[str, Mapping[str, float]] = figures["matrices"]
    every, settings = {**matrices, **figures.get("rounded", {})}, outcome.record["settings"]
    errors = {name: float(one["relative_error"]) for name, one in every.items()}
    resumed = f", {outcome.resumed} matrices of them by an earlier run" if outcome.resumed else ""
    rows = [
        ("parameters", f"{plan.params_before:,} -> {plan.params_after:,}"),
        ("weight files", f"{size(plan.bytes_before)} -> {size(plan.bytes_after)}"),
    ]
    if plan.grids:
        rows.append(("bits", widths_in_words(plan.targets)))
    if errors:
        worst, mean = max(errors, key=lambda name: errors[name]), sum(errors.values()) / len(errors)
        rows.append(("relative error", f"mean {mean:.4f}, worst {errors[worst]:.4f} ({worst}){resumed}"))
    if (done := SOLVERS[settings["solver"]].done(list(matrices.values()))) is not None:
        rows.append((f"{settings['solver']} solver", done))
    if "tokens" in settings:
        rows.append(("calibration", calibrated(METHODS[plan.method], settings)))
    outputs = [float(matrix["output_error"]) for matrix in matrices.values() if "output_error" in matrix]
    if outputs:
        mean = sum(outputs) / len(outputs)
        rows.append(("error of the outputs", f"mean {mean:.4f}, worst {max(outputs):.4f}, on the calibration text"))
    if "measured_loss" in figures:
        guess = ""
        if "predicted_loss" in figures:
            rough = rough_guess(worths=any("worth" in one for one in every.values()))
            guess = f" ({figures['predicted_loss']:+.4f} predicted; {rough})"
        measured = f"{figures['measured_loss']:+.4f} nats per token on {figures['dense_loss']:.4f}"
        text = "the calibration text" if "tokens" not in settings else f"the {settings['tokens']:,} calibration tokens"
        rows.append(("loss added", f"{measured}, measured on {text}, to which it was fitted{guess}"))
    if "budget" in figures:
        from svdconvert.commands.measured_budgets import MeasuredBudget

        rows.append(("budget measured", str(MeasuredBudget.from_json(figures["budget"]))))
    rows += [*_healed(outcome.record), *_times(outcome)]
    memory = size(outcome.peak_memory_bytes)
    if outcome.peak_device_bytes:
        memory += f" on the host, {size(outcome.peak_device_bytes)} on the GPU"
    rows.append(("peak memory", memory))
    rows += [("checked", check) for check in outcome.checks]
    rows.append(("written to", str(report.folder)))
    if (report.folder / REPORT).is_file():
        rows.append(("page", str(report.folder / REPORT)))
    if report.url:
        rows.append(("pushed to", report.url))
    rows.append(("next", told(next_steps(METHODS[plan.method], settings, report.folder))))
    show_pairs(console, rows)


def _healed(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What healing was worth after the conversion, whose own figures are those before it."""
    told = record.get("healing")
    if told is None:
        return []
    on = f"on {told['held_out_tokens']:,} held-out tokens"
    if not told["changed"]:
        return [("healed", f"brought no gain {on}, so the factors were kept (KL {told['before']['kl']:.4f})")]
    dense, ends = told["dense_loss"], (told["before"], told["after"])
    kl = " -> ".join(f"{end['kl']:.4f}" for end in ends)
    perplexities = " -> ".join(f"{perplexity(dense + end['added']):.2f}" for end in ends)
    return [
        (
            "healed",
            f"KL(dense || model) {kl} nats per token, perplexity {perplexities} (dense {perplexity(dense):.2f}), {on}; "
            "what is above is from before",
        )
    ]


def show_evaluation(console: Console, result: Evaluation) -> None:
    """Print a perplexity with everything it depends on."""
    rows = [("perplexity", f"{result.perplexity:.4f} per token")]
    if result.bits_per_character is not None:
        rows.append(("bits per character", f"{result.bits_per_character:.4f}"))
    if (far := result.divergence) is not None:
        rows += [
            (f"against {result.against}", f"KL {far.kl:.4f} nats per token, {far.agreement:.1%} same first choice"),
            (
                "added log-perplexity",
                f"{far.added:+.4f} on {far.cross_entropy:.4f} (perplexity {perplexity(far.cross_entropy):,.4f})",
            ),
            ("entropy of that model", f"{far.entropy:.4f} nats per token" + _confidence(far)),
        ]
    stride = f", moved by {result.stride}" if result.protocol == "sliding" else " that do not overlap"
    opening = f"after {result.opening}" if result.opening else "without an opening token"
    rows += [
        ("text", f"{result.text}: {result.tokens:,} tokens predicted, {result.characters:,} characters, {opening}"),
        ("protocol", f"{result.protocol}: windows of {result.window:,} tokens{stride}"),
        ("parameters", f"{result.parameters:,}"),
        ("computed in", f"{result.dtype} on {result.device}, {result.seconds:.1f} s"),
    ]
    show_pairs(console, rows)


def _confidence(far: Divergence) -> str:
    """A warning where perplexity is misleading."""
    return (
        "; it is over-confident here, so a lower perplexity does not mean a better copy" if far.over_confident else ""
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
    """The total time and that of its stages; short ones are left out."""
    rows = [("time", f"{outcome.seconds:.1f} s")]
    if outcome.already_done:
        return rows
    processes = outcome.record["timing"]
    for number, stages in enumerate(processes):
        times = {stage: StageTime.from_json(time) for stage, time in stages.items()}
        texts = [
            f"{stage} {time.wall_seconds:.1f} s"
            + (f" in {time.workers} workers" if (time.workers or 1) > 1 else "")
            + f" (CPU {time.cpu_seconds:.1f} s)"
            for stage, time in times.items()
            if max(time.wall_seconds, time.cpu_seconds) >= 0.05
        ]
        if texts:
            rows.append(("stages" if len(processes) == 1 else f"stages of process {number}", ", ".join(texts)))
    return rows


def show_ablation(console: Console, results: Sequence[GroupResult]) -> None:
    """Print an ablation, the untouched model first."""
    table = new_table((), ("group", "singular values", "energy", "perplexity", "added log-perplexity"))
    dense = results[0].perplexity
    table.add_row("none", "", "", f"{dense:.2f}", "")
    for row in results[1:]:
        place = f"{row.first:.0%} to {row.last:.0%}"
        added = f"{math.log(row.perplexity / dense):+.4f}"
        table.add_row(str(row.group), place, f"{row.energy:.2%}", f"{row.perplexity:.2f}", added)
    show_table(console, table)


def show_spectra(console: Console, spectra: Spectra, *, per_layer: bool = False) -> None:
    """Print spectra: lowest, median and highest values of each kind of matrix, or every matrix."""
    from svdconvert.words import percent

    columns: dict[str, tuple[Callable[[MatrixSpectrum], float], Callable[[float], str]]] = {
        "effective rank": (lambda matrix: matrix.effective_rank, "{:,.1f}".format),
        "stable rank": (lambda matrix: matrix.stable_rank, "{:,.1f}".format),
        "90%": (lambda matrix: matrix.rank_at(0.90), "{:,.0f}".format),
        "95%": (lambda matrix: matrix.rank_at(0.95), "{:,.0f}".format),
        "99%": (lambda matrix: matrix.rank_at(0.99), "{:,.0f}".format),
        "break-even": (lambda matrix: matrix.break_even, "{:,.1f}".format),
        "keeps": (lambda matrix: matrix.break_even_energy, percent),
    }
    if all(matrix.outputs is not None for matrix in spectra.matrices):
        columns["output error"] = (lambda matrix: matrix.break_even_output_error or 0.0, "{:.4f}".format)
    table = new_table(("target", "shape"), () if per_layer else ("matrices",))
    if not per_layer:
        table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, no_wrap=True, justify="right")
    for (kind, shape), matrices in spectra.kinds.items():
        size = f"{shape[0]} x {shape[1]}"
        values = {name: [value(matrix) for matrix in matrices] for name, (value, _) in columns.items()}
        if per_layer:
            for i, matrix in enumerate(matrices):
                table.add_row(matrix.module, size, *(show(values[name][i]) for name, (_, show) in columns.items()))
            continue
        for i, (name, pick) in enumerate(_PICKS.items()):
            label = (kind, size, str(len(matrices))) if i == 0 else ("", "", "")
            table.add_row(*label, name, *(show(pick(values[column])) for column, (_, show) in columns.items()))
    metrics = "plain" if spectra.method == "svd" else f"in the metrics of {spectra.method}"
    console.print(f"[bold]{escape(spectra.model)}[/], {metrics}, layout {spectra.layout}")
    show_table(console, table, keys=(0,) if per_layer else (0, 3))
    console.print("90%, 95%, 99%: least rank with that share of the energy", style="dim", highlight=False)
    outputs = ", and the error of the outputs there" if "output error" in columns else ""
    console.print(f"keeps: share at the highest rank that saves something{outputs}", style="dim", highlight=False)
    console.print(escape(spectra.headline), highlight=False)


def show_sweep(console: Console, sweep: Sweep) -> None:
    """Print a sweep, the dense model first."""
    table = new_table(("",), ("budget", "parameters", "weight files", "perplexity", "added", "KL"))
    dense = sweep.dense
    table.add_row("dense", "", f"{dense.params:,}", size(dense.bytes), f"{dense.perplexity:.2f}", "", "")
    for line, points in sweep.lines.items():
        for i, point in enumerate(points):
            cells = (f"{point.params:,}", size(point.bytes), f"{point.perplexity:.2f}", f"{point.added:+.4f}")
            kl = "" if point.kl is None else f"{point.kl:.4f}"
            table.add_row("" if i else line, point.setting.budget, *cells, kl)
    show_table(console, table, keys=(0, 1))
    console.print("added to the dense model's log-perplexity, and KL(dense || model): nats per token", style="dim")
    console.print(escape(sweep.headline), highlight=False)
    show_pairs(console, [("written to", str(sweep.folder))])


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """Print checks, one a line."""
    for check in checks:
        mark = "[green]ok[/]    " if check.passed else "[red]failed[/]"
        console.print(f"{mark} [bold]{check.name}[/]: {escape(told(check.detail))}")
