"""`svdconvert options`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.cli.fields import ask, take_calibration
from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    dtype_option,
    json_option,
    model_argument,
    quiet_option,
    revision_option,
    targets_option,
    text_options,
    work_option,
    workers_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, job_events, print_json
from svdconvert.cli.tables import new_table, show_table
from svdconvert.cli.types import FILE

if TYPE_CHECKING:
    from rich.console import Console

    from svdconvert.commands.ways import Options


@main.command()
@model_argument
@text_options
@ask("fit", help="Say of every way whether it fits so much memory of a device, 8GB say; a tenth is left free.")
@ask("fit_context", help="Tokens whose cache of keys and values has to fit as well.")
@option(
    "--measure",
    type=FILE,
    group="Measuring",
    help="UTF-8 text file: make every way, measure it there against the dense model, and remove it.",
)
@option(
    "--window",
    type=int,
    group="Measuring",
    help="Tokens per window; they do not overlap.  [default: 2048, or the model's longest context]",
)
@targets_option
@dtype_option
@option("--out", type=FILE, group="Output", help="Page to write, an .html file: a picture and the table.")
@workers_option
@work_option
@revision_option
@device_option
@json_option
@quiet_option
def options(model: str, out: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """What can be had of MODEL: dense in fewer bits, of lower rank, or both; bytes, loss and speed of each.

    With --work the same command goes on where it was interrupted, and `convert --work` starts from what is there.
    """
    calibration = take_calibration(given)
    if out is not None:
        from svdconvert.commands.html_report import check_page

        check_page(out)
    from svdconvert.commands.option_checks import check_options

    names = ("stats", "measure", "window")
    check_options(model, given=calibration is not None, **{name: given[name] for name in names})
    from svdconvert.commands.options import options as run

    console = console_for(as_json)
    with job_events(console, quiet=quiet) as events:
        result = run(model, calibration=calibration, **given, events=events)
    if out is not None:
        from svdconvert.commands.html_report import write_options

        write_options(result, out)
    if as_json:
        print_json(result.to_json())
        return
    show_options(console, result)
    if out is not None:
        console.print(f"written to {out}", highlight=False, markup=False)


def show_options(console: Console, result: Options) -> None:
    """Print all ways, and what follows."""
    table = new_table(("",), result.heads)
    for way in result.ways:
        table.add_row(way.name, *result.cells(way))
    show_table(console, table)
    console.print(result.about, style="dim", markup=False, highlight=False)
    if result.room is not None:
        console.print(result.room, style="dim", markup=False, highlight=False)
    for sentence in result.advice:
        console.print(sentence, markup=False, highlight=False)
    for way in result.ways:
        if way.command:
            line = f"{way.name}: {way.command}"
            console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)  # to be copied whole
