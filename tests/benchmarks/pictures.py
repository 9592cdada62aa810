"""A picture of every benchmark's result; also again from what has been written.

    python -m tests.benchmarks.pictures out/benchmarks

matplotlib is not needed to measure: without it, tables say that there is no picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from svdconvert.commands.figures import GREY, empty_figure, need_matplotlib, save_figure
from svdconvert.errors import InputError

from .measure import repeated
from .panels import Bar, draw_bars, draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Result = Mapping[str, Any]
    Panels = Mapping[str, Mapping[str, Sequence[Bar | None]]]

# Columns and lines of the growth picture: key of a row -> what the axis says, and bytes or seconds in its unit.
GROWING = {"layers": "layers", "hidden": "hidden size", "rank": "rank"}
COSTS = {"tool_seconds": ("seconds", 1.0), "peak_bytes": ("peak memory, MB", 1e6)}


def _size(shape: Sequence[int], rank: int) -> str:
    return f"{' x '.join(map(str, shape))}, rank {rank}"


def _mean(found: Mapping[str, float]) -> str:
    return f"geometric mean {found['geometric_mean']:.2f}x, smallest {found['smallest']:.2f}x"


def solver(result: Result) -> Figure:
    """How many times as fast as torch's two, every matrix."""
    matrices = result["matrices"]
    series = {}
    for name, found in result["overall"].items():
        excess = max(row["excess"][name] for row in matrices)
        series[f"against {name}, whose excess error is up to {excess:.0e}: {_mean(found)}"] = [
            Bar(row["faster"][name], f"{row['faster'][name]:.1f}x  ({_against(row['median'], name)})")
            for row in matrices
        ]
    groups = [f"{row['model']} {row['layer']}\n{_size(row['shape'], row['rank'])}" for row in matrices]
    excess = max(row["excess"]["svdconvert"] for row in matrices)
    title = (
        f"One matrix: svdconvert's solver, whose excess error is up to {excess:.0e}\n"
        f"CPU seconds of one thread, svdconvert's against the other's, {repeated(result['repeats'])}, "
        f"spectrum {result['spectrum']}"
    )
    return _bars(title, (groups, {"times as fast": series}))


def metrics(result: Result) -> Figure:
    """How many times as fast as SVD-LLM's recipe, every matrix."""
    matrices = result["matrices"]
    apart = max(abs(row["error"]["svdconvert"] / row["error"]["SVD-LLM"] - 1) for row in matrices)
    bars = [Bar(row["ratio"], f"{row['ratio']:.1f}x  ({_against(row['median'], 'SVD-LLM')})") for row in matrices]
    groups = [f"{row['layer']}\n{_size(row['shape'], row['rank'])}" for row in matrices]
    sides = {"one": "the metric of the inputs", "two": "metrics of both sides"}[result["sides"]]
    title = (
        f"One matrix in {sides}: svdconvert's solver against SVD-LLM's recipe, errors {apart:.0e} apart\n"
        f"CPU seconds of one thread, svdconvert's against the other's, {repeated(result['repeats'])}"
    )
    return _bars(title, (groups, {"times as fast": {f"against SVD-LLM: {_mean(result['overall'])}": bars}}))


def _against(seconds: Mapping[str, float], other: str) -> str:
    return f"{_short(seconds['svdconvert'])} s against {_short(seconds[other])} s"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def memory(result: Result) -> Figure:
    """Peak memory against layers, with one file and with many."""
    rows = result["runs"]
    one_file = max(row["max_output_file"] for row in rows)
    names = {
        limit: "one file" if limit == one_file else f"files of up to {limit / 1e6:.0f} MB"
        for limit in dict.fromkeys(row["max_output_file"] for row in rows)
    }
    curves = {
        f"{name}, read and written": [
            (row["layers"], row["peak_bytes"] / 1e6) for row in rows if row["max_output_file"] == limit
        ]
        for limit, name in names.items()
    }
    figure = empty_figure(6.5, 4.0)
    panel = figure.subplots()
    draw_curves(panel, curves, "layers")
    panel.set_ylim(0, 1.15 * max(row["peak_bytes"] for row in rows) / 1e6)
    panel.set_ylabel("peak memory, MB")
    panel.legend(frameon=False, fontsize=9, loc="lower right")
    title = f"Peak memory of a conversion on the CPU, one worker, hidden size {rows[0]['hidden']}"
    figure.suptitle(f"{title}\n{repeated(result['repeats'])}", fontsize=11)
    return figure


def calibration(result: Result) -> Figure:
    """Time and peak memory of every phase."""
    series: dict[str, dict[str, list[Bar | None]]] = {"wall seconds, all blocks": {}, "peak memory, MB": {}}
    groups: list[str] = []
    for one in result["runs"]:
        name = f"layers: {one['layers']}, {one['wall_s']:.1f} s in all"
        groups = ["of that, Gram sums" if phase == "Gram sums" else phase.split(",")[0] for phase in one["phases"]]
        phases = [(one["times"][phase], runs) for phase, runs in one["phases"].items()]
        walls = [times * median(run["wall_s"] for run in runs) for times, runs in phases]
        peaks = [max((run["peak_bytes"] or 0) / 1e6 for run in runs) for _, runs in phases]
        time_bars, memory_bars = series.values()
        time_bars[name] = [Bar(value, f"{value:.2f}") for value in walls]
        memory_bars[name] = [Bar(value, f"{value:,.0f}") if value else None for value in peaks]
    title = (
        f"Calibration for {result['method']}: {result['model']}, hidden size {result['hidden']:,}, "
        f"{result['tokens']:,} tokens\n{repeated(result['repeats'])}"
    )
    # A machine that does not tell memory has no such panel.
    known = {unit: bars for unit, bars in series.items() if any(any(row) for row in bars.values())}
    return _bars(title, (groups, known))


def growth(result: Result) -> Figure:
    """Time and memory against layers, hidden size and rank."""
    figure = empty_figure(9, 5)
    panels = figure.subplots(len(COSTS), len(GROWING), sharey="row")
    for line, (cost, (unit, size)) in enumerate(COSTS.items()):
        for panel, (name, label) in zip(panels[line], GROWING.items(), strict=True):
            points = [(row[name], row[cost] / size) for row in result["runs"] if row["varied"] == name]
            draw_curves(panel, {label: points}, label, first_colour=line)
        # Shared along a row, and so set once all of it is drawn: what a limit fixes before, later lines do not move.
        panels[line][0].set_ylim(0, 1.1 * max(row[cost] for row in result["runs"]) / size)
        panels[line][0].set_ylabel(unit)
    first = {name: next(row[name] for row in result["runs"] if row["varied"] == name) for name in GROWING}
    title = "Growth of a conversion on the CPU, one worker; what is not varied stays at "
    title += ", ".join(f"{GROWING[name]} {value}" for name, value in first.items())
    figure.suptitle(f"{title}\n{repeated(result['repeats'])}", fontsize=11)
    return figure


def inference(result: Result) -> Figure:
    """Prefill, decoding and training step against the dense model, and the memory of training."""
    series: dict[str, dict[str, list[Bar | None]]] = {}
    for kind, title in (("prefill", "prefill"), ("decode", "decoding")):
        bars: dict[str, list[Bar | None]] = {}
        for row in result["inference"]:
            way = f"batch {row['batch']}{', compiled' if row['compiled'] else ''}"
            speed = row[f"{kind}_faster"]
            # Rows come in the order of the variants.
            bars.setdefault(way, []).append(Bar(speed, f"{speed:.2f}x, {row[f'{kind}_tokens_per_s']:,.0f}/s"))
        series[f"{title}, times the dense tokens/s"] = bars
    training = []
    if steps := result["training"]:
        peaks = [row["peak_bytes"] / 1e6 for row in steps]
        panels = {
            "training step, times as fast": [
                Bar(row["faster"], f"{row['faster']:.2f}x, {row['step_s']:.2g} s") for row in steps
            ],
            "peak memory of training, MB": [Bar(peak, f"{peak:,.0f}") for peak in peaks],
        }
        names = [row["variant"] for row in steps]
        training.append((names, {unit: {"": bars} for unit, bars in panels.items()}))
    title = (
        f"{result['model']}, hidden size {result['hidden']:,}, {result['layers']} layers, rank {result['rank']}, "
        f"{result['dtype']} on {result['device']}, against dense\nprompt of {result['prompt']} tokens, "
        f"{result['tokens']} decoded, {'CPU' if result['cpu_time'] else 'wall'} time, {repeated(result['repeats'])}"
    )
    return _bars(title, (list(result["bytes"]), series), *training)


def latent_cache(result: Result) -> Figure:
    """Numbers kept for a token, and time of a step."""
    rows = result["rows"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    series: dict[str, dict[str, list[Bar | None]]] = {"memory of all layers, MB": {}, "CPU time of a block, ms": {}}
    for row in rows:
        time, space = row["block_s"] * 1e3, row["model_bytes"] / 1e6
        memory_bars, time_bars = (bars.setdefault(f"batch {row['batch']}", []) for bars in series.values())
        memory_bars.append(Bar(space, f"{space:,.0f}  ({row['smaller']:.1f}x smaller)"))
        time_bars.append(Bar(time, f"{_short(time)}  ({row['slower']:.2f}x)"))
    title = (
        f"What is cached of a token: {result['model']}, hidden size {result['hidden']:,}, rank {result['rank']}\n"
        f"one token on top of {result['tokens']:,}, {result['dtype']}, one thread, {repeated(result['repeats'])}"
    )
    return _bars(title, (ways, series))


def processes(result: Result) -> Figure:
    """Seconds of every way to share a conversion out."""
    rows = result["rows"]
    keys = {
        "without starting Python and torch": ("tool_seconds", "faster"),
        "whole command": ("wall_s", "faster_wall"),
    }
    series = {
        name: [Bar(row[seconds], f"{row[seconds]:.1f} s, {row[faster]:.2f}x") for row in rows]
        for name, (seconds, faster) in keys.items()
    }
    title = (
        f"A conversion shared out: {result['layers']} layers of {result['model']}, hidden size {result['hidden']:,}, "
        f"rank {result['rank']}\n{repeated(result['repeats'])}"
    )
    return _bars(title, ([row["way"].replace(", ", ",\n", 1) for row in rows], {"wall seconds": series}))


def conversion(result: Result) -> Figure:
    """Wall and CPU time and peak memory against the full SVD of the model in memory."""
    summary = dict(result["summary"])
    full = summary.pop("full_svd", None)
    costs = {
        "wall seconds": ("total_s", "wall_s", "speed_ratio", 1.0),
        "CPU seconds": ("svd_cpu_s", "cpu_s", "cpu_ratio", 1.0),
        "peak memory without self-check, MB": ("peak_bytes", "conversion_peak_bytes", "memory_ratio", 1e6),
    }
    groups = [f"svdconvert,\n{name.replace('workers', '--workers')}" for name in summary]
    series: dict[str, dict[str, list[Bar | None]]] = {}
    for unit, (theirs, ours, ratio, size) in costs.items():
        bars: list[Bar | None] = [Bar(full[theirs] / size, _short(full[theirs] / size))] if full else []
        for row in summary.values():
            value = row[ours] / size
            bars.append(Bar(value, _short(value) + (f"  ({row[ratio]:.1f}x less)" if full else "")))
        series[unit] = {"": bars}
    title = (
        f"A whole conversion: polyglot-ko-{result['model']} geometry, {result['layers']} layers of "
        f"{result['hidden']:,}, rank {result['rank']}, {result['device']}\n{repeated(result['repeats'])}, in turn"
    )
    return _bars(title, (["full SVD, model in memory\n(extrapolated)"] * bool(full) + groups, series))


def filtered(result: Result) -> Figure:
    """How many times as fast the filtered subspace is as the exact solver, against the rank."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        name = " x ".join(map(str, row["shape"]))
        curves.setdefault(name, []).append((row["rank"], row["exact_s"] / row["filtered_s"]))
    figure = empty_figure(6.5, 4.0)
    panel = figure.subplots()
    draw_curves(panel, curves, "rank")
    panel.axhline(1, color=GREY, linestyle="--", linewidth=1)
    panel.set_ylim(0, 1.1 * max(speed for points in curves.values() for _, speed in points))
    panel.set_ylabel("times as fast as exact")
    panel.legend(frameon=False, fontsize=9)
    excess = max(row["excess"] for row in result["rows"])
    figure.suptitle(f"One matrix: filtered against exact, excess error up to {excess:.0e}", fontsize=11)
    return figure


# First words of what is written -> its picture.
PICTURES: Mapping[str, Callable[[Result], Figure]] = {
    "solver": solver,
    "metrics": metrics,
    "memory": memory,
    "calibration": calibration,
    "growth": growth,
    "inference": inference,
    "latent-cache": latent_cache,
    "processes": processes,
    "conversion": conversion,
    "filtered": filtered,
}


def picture_of(name: str) -> Callable[[Result], Figure] | None:
    """What draws the result of this name, such as ``metrics-two``; None if nothing does."""
    return next((draw for kind, draw in PICTURES.items() if name == kind or name.startswith(f"{kind}-")), None)


def add_picture(folder: Path, name: str) -> str:
    """Draw ``NAME.png`` from ``NAME.json``.

    Returns:
        A line of Markdown that shows it, or says that there is none; empty for what has no picture.
    """
    draw, path = picture_of(name), folder / f"{name}.png"
    if draw is None:
        return ""
    try:
        need_matplotlib()
    except InputError as error:
        path.unlink(missing_ok=True)  # an earlier run's would be shown beside other figures
        return f"No picture was drawn: {error}."
    save_figure(draw(json.loads((folder / f"{name}.json").read_text())), path)
    return f"![{name}]({path.name})"


def _bars(title: str, *lines: tuple[Sequence[str], Panels]) -> Figure:
    """Lines of panels of bars; those of a line have the same groups, and as many panels as the other lines have.

    Args:
        title: of the figure.
        lines: names of the groups, and the panels, unit -> series as of :func:`draw_bars`. Where the unit says
            "times", what is compared with lies at 1. The series of the first panel are explained.
    """
    columns = len(lines[0][1])
    heights = [0.9 + len(groups) * max(0.2 * _most(panels) + 0.1, 0.4) for groups, panels in lines]
    figure = empty_figure(4.2 * columns + 2.6 if columns > 1 else 9.5, sum(heights) + 0.8)
    grid = figure.subplots(len(lines), columns, sharey="row", squeeze=False, height_ratios=heights)
    for row, (groups, panels) in zip(grid, lines, strict=True):
        for panel, (unit, series) in zip(row, panels.items(), strict=True):
            draw_bars(panel, groups, series, unit, compared=1.0 if "times" in unit else 0.0)
    handles, names = grid[0][0].get_legend_handles_labels()
    if names:
        below = {"loc": "outside lower center", "ncols": 1 if columns == 1 else 4}
        figure.legend(handles, names, frameon=False, fontsize=9, **below)
    figure.suptitle(title, fontsize=11)
    return figure


def _most(panels: Panels) -> int:
    """How many bars a group has."""
    return max(len(series) for series in panels.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pictures")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/benchmarks"), help="where the JSON files are")
    options = parser.parse_args()
    names = [path.stem for path in sorted(options.folder.glob("*.json")) if picture_of(path.stem)]
    if not names:
        parser.error(f"no benchmark's JSON in {options.folder}")
    for name in names:
        print(add_picture(options.folder, name))


if __name__ == "__main__":
    main()
