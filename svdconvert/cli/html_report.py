"""`svdconvert report`."""

from __future__ import annotations

from pathlib import Path

import click

from svdconvert.cli.groups import option
from svdconvert.cli.parameters import folder_argument
from svdconvert.cli.program import main
from svdconvert.cli.screen import need_folder
from svdconvert.cli.types import FILE


@main.command()
@folder_argument
@option("--out", type=FILE, group="Output", help="File to write.  [default: report.html or sweep.html in FOLDER]")
def report(folder: Path, out: Path | None) -> None:
    """Write a page about a finished result or a sweep, to look at in a browser: report.html or sweep.html."""
    need_folder(folder)
    from svdconvert.commands.html_report import report as run

    click.echo(run(folder, out))
