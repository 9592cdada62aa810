"""`svdconvert sweep`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from svdconvert.cli.fields import ask, take_calibration
from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    allocation_option,
    device_option,
    dtype_option,
    json_option,
    method_options,
    model_argument,
    overwrite_option,
    quiet_option,
    refit_option,
    revision_option,
    split_option,
    targets_option,
    text_options,
    window_options,
    work_option,
    workers_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, job_events, print_json
from svdconvert.cli.types import FILE, FOLDER
from svdconvert.errors import InputError
from svdconvert.sentences import asked


@main.command()
@model_argument
@option("--text", type=FILE, required=True, group="Measuring", help="UTF-8 text file to measure on.")
@option("--keep", metavar="FRACTIONS", group="Size", help="Fractions of the target parameters to keep: 0.3,0.5,0.7.")
@option("--rank", metavar="RANKS", default=None, group="Size", help="Instead: ranks of every target: 128,256.")
@ask(
    "method",
    name="methods",
    multiple=True,
    help="How to factor (repeatable).  [default: kfac where there is a text, else svd]",
)
@ask("layout", name="layouts", multiple=True, default=["balanced"], help="How products are stored (repeatable).")
@allocation_option
@method_options
@refit_option
@text_options
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
@quiet_option
def sweep(
    model: str,
    text: Path,
    keep: str | None,
    rank: str | None,
    out: Path | None,
    no_plot: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Perplexity of MODEL at several sizes, from one calibration: a table and a picture.

    Run the same command again to continue an interrupted sweep; with other budgets, methods or layouts it adds their
    points to the folder.
    """
    budgets: dict[str, Any] = {"keep": _numbers("keep", keep, float), "rank": _numbers("rank", rank, int)}
    calibration = take_calibration(options)
    if out is None:
        raise InputError(f"{asked('out')} is missing: the folder to write the sweep to")
    if not no_plot:
        from svdconvert.commands.figures import need_matplotlib

        need_matplotlib()
    from svdconvert.cli.report import show_sweep
    from svdconvert.commands.sweep import sweep as run

    console = console_for(as_json)
    with job_events(console, quiet=quiet) as events:
        result = run(model, text, out, **budgets, **options, calibration=calibration, plot=not no_plot, events=events)
    if as_json:
        print_json(result.to_json())
    elif quiet:
        click.echo(result.folder)
    else:
        show_sweep(console, result)


def _numbers(field: str, text: str | None, kind: Callable[[str], float]) -> list[float]:
    """``0.3,0.5`` -> [0.3, 0.5]."""
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{asked(field)} {text!r} is not a list of numbers; separate them with commas") from None
