"""The commands that lead to a factored model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from svdconvert.cli.groups import FILE, FOLDER, MethodName, option
from svdconvert.cli.parameters import (
    LAYOUTS,
    allocation_option,
    device_option,
    dtype_option,
    hub_revision_option,
    json_option,
    method_option,
    metric_options,
    model_argument,
    overwrite_option,
    plan_options,
    private_option,
    refit_option,
    revision_option,
    split_option,
    stats_option,
    targets_option,
    text_options,
    verbose_option,
    window_options,
    work_option,
    workers_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, print_json
from svdconvert.errors import InputError


@main.command()
@model_argument
@option("--out", type=FOLDER, group="Output", help="Folder to write.  [required unless --dry-run]")
@plan_options
@metric_options
@allocation_option
@refit_option
@text_options
@stats_option
@overwrite_option
@option("--no-check", is_flag=True, group="Output", help="Leave out the check of the result: keys, shapes and logits.")
@option("--dry-run", is_flag=True, group="Running", help="Say what would happen, from headers alone, and stop.")
@device_option
@workers_option
@work_option
@option(
    "--keep-work",
    is_flag=True,
    group="Running",
    help="Keep statistics and decompositions beside the result: short for --work OUT-work.",
)
@json_option
@verbose_option
@option("--push-to-hub", metavar="REPO", group="Hub", help="Upload the result to this repository.")
@private_option
@hub_revision_option
def convert(
    model: str,
    out: Path | None,
    device: str,
    allocation: str | None,
    stats: Path | None,
    alpha: float | None,
    shrinkage: float | None,
    refit: str,
    work: Path | None,
    keep_work: bool,
    workers: int | None,
    overwrite: bool,
    no_check: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    push_to_hub: str | None,
    private: bool,
    hub_revision: str | None,
    **request: Any,
) -> None:
    """Factor MODEL and write the result to a folder (the default command).

    MODEL is a local folder, `owner/name` on the Hub, or a short name: polyglot-ko-1.3b, -3.8b, -5.8b, -12.8b. A run
    that was interrupted goes on when the same command is given again.
    """
    calibration = _calibration(request)
    if dry_run:
        from svdconvert.calibration.knowledge import default_method
        from svdconvert.solvers.table import check_solver

        request["method"] = default_method(request["method"], calibration, stats)
        check_solver(
            request["solver"],
            request["method"],
            allocation=allocation,
            refit=refit,
            keeps=keep_work or work is not None,
        )
        _show_plan(model, out, as_json, request)
        return
    if out is None:
        raise InputError("--out is missing: the folder to write the factored model to")
    from svdconvert.cli.progress import TerminalEvents
    from svdconvert.cli.report import show_result
    from svdconvert.commands.convert import convert as run

    console = console_for(as_json)
    with TerminalEvents(console, verbose=verbose) as events:
        result = run(
            model,
            out,
            **_request(request),
            device=device,
            calibration=calibration,
            allocation=allocation,
            stats=stats,
            alpha=alpha,
            shrinkage=shrinkage,
            refit=refit,
            work=work,
            keep_work=keep_work,
            workers=workers,
            overwrite=overwrite,
            check=not no_check,
            push_to_hub=push_to_hub,
            private=private,
            hub_revision=hub_revision,
            events=events,
        )
    if as_json:
        print_json(result.to_json())
    else:
        show_result(console, result)


@main.command()
@model_argument
@option("--out", type=FOLDER, group="Output", help="Folder that would be written, for the disk's free room.")
@plan_options
@json_option
def plan(model: str, out: Path | None, as_json: bool, **request: Any) -> None:
    """Say what a conversion would do, from config and headers alone.

    For a Hub repository only headers are downloaded; a folder with nothing but config.json will do.
    """
    _show_plan(model, out, as_json, request)


@main.command()
@model_argument
@option("--out", type=FOLDER, required=True, group="Output", help="Folder to write the statistics to.")
@option(
    "--method",
    "methods",
    type=MethodName(),
    multiple=True,
    default=["kfac"],
    show_default=True,
    group="Method",
    help="What they are for (repeatable).",
)
@text_options
@revision_option
@device_option
def calibrate(model: str, out: Path, methods: Sequence[str], revision: str | None, device: str, **text: Any) -> None:
    """Collect the statistics of data-aware methods once, for many conversions (`--stats`)."""
    calibration = _calibration(text)
    if calibration is None:
        raise InputError("--calib is missing: the text to collect statistics from")
    from svdconvert.cli.progress import TerminalEvents
    from svdconvert.commands.calibrate import calibrate as run

    with TerminalEvents(console_for(False)) as events:
        run(model, calibration, out, methods=methods, revision=revision, device=device, events=events)
    click.echo(f"statistics written to {out}")


@main.command()
@model_argument
@method_option
@metric_options
@option("--layout", type=LAYOUTS, group="Method", help="What break-even is told for.")
@text_options
@stats_option
@targets_option
@split_option
@option("--per-layer", is_flag=True, group="Output", help="A line for every matrix, instead of three for every kind.")
@option("--out", type=FOLDER, group="Output", help="Folder to write spectrum.json and spectrum.png to.")
@option("--plot", type=FILE, group="Output", help="Draw to this .png, .svg or .pdf.")
@work_option
@revision_option
@device_option
@json_option
def spectrum(model: str, per_layer: bool, out: Path | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Singular values of MODEL's matrices, how they fall off, and what break-even keeps of them.

    Of the weights themselves, or, with --method and a text, as that method weighs them.
    """
    from svdconvert.commands.figures import check_picture, need_matplotlib

    if out is not None:
        need_matplotlib()
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; give a folder with --out")
    if plot is not None:
        check_picture(plot)
    calibration = _calibration(options)
    from svdconvert.cli.progress import TerminalEvents
    from svdconvert.cli.report import show_spectra
    from svdconvert.commands.figures import save_figure, spectrum_figure
    from svdconvert.commands.spectrum import spectrum as run

    console = console_for(as_json)
    with TerminalEvents(console) as events:
        found = run(model, calibration=calibration, **options, events=events)
    if out is not None:
        from svdconvert.storage.disk import atomic_write, disk_errors

        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            atomic_write(out / "spectrum.json", (json.dumps(found.to_json(), ensure_ascii=False) + "\n").encode())
    for picture in (*([out / "spectrum.png"] if out else []), *([plot] if plot else [])):
        save_figure(spectrum_figure(found), picture)
    if as_json:
        print_json(found.to_json())
    else:
        show_spectra(console, found, per_layer=per_layer)
        for place in (out, plot):
            if place is not None:
                click.echo(f"written to {place}")


@main.command()
@model_argument
@option("--text", type=FILE, required=True, group="Measuring", help="UTF-8 text file to measure on.")
@option("--keep", metavar="FRACTIONS", group="Size", help="Fractions of the target parameters to keep: 0.3,0.5,0.7.")
@option("--rank", metavar="RANKS", default=None, group="Size", help="Instead: ranks of every target: 128,256.")
@option(
    "--method",
    "methods",
    type=MethodName(),
    multiple=True,
    group="Method",
    help="How to factor (repeatable).  [default: kfac where there is a text, else svd]",
)
@option(
    "--layout",
    "layouts",
    type=LAYOUTS,
    multiple=True,
    default=["balanced"],
    group="Method",
    help="How products are stored (repeatable).",
)
@allocation_option
@metric_options
@refit_option
@text_options
@stats_option
@targets_option
@split_option
@dtype_option
@window_options
@workers_option
@work_option
@revision_option
@device_option
@option("--out", type=FOLDER, group="Output", help="Folder for sweep.json, sweep.md, sweep.png.  [required]")
@option("--keep-models", is_flag=True, group="Output", help="Keep every converted model in OUT/models.")
@option("--no-plot", is_flag=True, group="Output", help="Write no sweep.png; needs no matplotlib.")
@overwrite_option
@json_option
def sweep(
    model: str,
    text: Path,
    keep: str | None,
    rank: str | None,
    out: Path | None,
    no_plot: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity of MODEL at several sizes, from one calibration: a table and a picture.

    The same command again goes on with an interrupted sweep; with other budgets, methods or layouts it adds to what
    the folder holds.
    """
    budgets: dict[str, Any] = {"keep": _numbers("--keep", keep, float), "rank": _numbers("--rank", rank, int)}
    calibration = _calibration(options)
    if out is None:
        raise InputError("--out is missing: the folder to write the sweep to")
    if not no_plot:
        from svdconvert.commands.figures import need_matplotlib

        need_matplotlib()
    from svdconvert.cli.progress import TerminalEvents
    from svdconvert.cli.report import show_sweep
    from svdconvert.commands.sweep import sweep as run

    console = console_for(as_json)
    with TerminalEvents(console) as events:
        result = run(model, text, out, **budgets, **options, calibration=calibration, plot=not no_plot, events=events)
    if as_json:
        print_json(result.to_json())
    else:
        show_sweep(console, result)


def _calibration(options: dict[str, Any]) -> Any:
    """Take the text's options out of all; None without a text."""
    from svdconvert.calibration.knowledge import Calibration

    names = {"calib": "text", "seed": "seed", "labels": "labels"}
    names |= {f"calib_{name}": name for name in ("field", "samples", "length", "batch_size")}
    chosen = {field: options.pop(option) for option, field in names.items()}
    return None if chosen["text"] is None else Calibration(**chosen)


def _numbers(option: str, text: str | None, kind: Callable[[str], float]) -> list[float]:
    """``0.3,0.5`` -> [0.3, 0.5]."""
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r} is not a list of numbers; separate them with commas") from None


def _request(options: dict[str, Any]) -> dict[str, Any]:
    """Command-line options in the terms of :func:`svdconvert.convert`."""
    from svdconvert.planning.ranks import parse_count, parse_rank_options

    options = dict(options)
    default, patterns = parse_rank_options(options.pop("ranks"))
    rank: int | dict[str, int] | None = default
    if patterns:
        rank = {**patterns, **({} if default is None else {"*": default})}
    params = options.pop("params")
    return {**options, "rank": rank, "params": None if params is None else parse_count(params)}


def _show_plan(model: str, out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    from svdconvert.cli.report import show_plan
    from svdconvert.commands.convert import plan as make
    from svdconvert.storage.disk import free_bytes

    made = make(model, **_request(options))
    if as_json:
        print_json(made.to_json())
    else:
        show_plan(console_for(as_json), made, free_bytes(out or Path()))
