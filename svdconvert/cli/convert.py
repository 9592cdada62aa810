"""`svdconvert convert`, the default command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svdconvert.cli.fields import ask_all, conversion_of
from svdconvert.cli.groups import option
from svdconvert.cli.parameters import json_option, model_argument, quiet_option, verbose_option
from svdconvert.cli.plan import print_plan
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, job_events, print_json
from svdconvert.cli.types import FOLDER
from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.options import SECTIONS


@main.command()
@model_argument
@option("--out", type=FOLDER, group="Output", help="Folder to write.  [required unless --dry-run]")
@option("--dry-run", is_flag=True, group="Running", help="Say what would happen, from headers alone, and stop.")
@ask_all(*SECTIONS)
@json_option
@verbose_option
@quiet_option
def convert(
    model: str, out: Path | None, dry_run: bool, as_json: bool, verbose: bool, quiet: bool, **options: Any
) -> None:
    """Factor MODEL and write the result to a folder (the default command).

    MODEL is a local folder, a GGUF file, `owner/name` on the Hub, or a short name: polyglot-ko-1.3b, -3.8b, -5.8b,
    -12.8b. Run the same command again to continue an interrupted run.
    """
    request = conversion_of(options)
    if dry_run:
        print_plan(model, out, as_json, request)
        return
    if out is None:
        raise InputError(f"{asked('out')} is missing: the folder to write the factored model to")
    from svdconvert.cli.report import show_result
    from svdconvert.commands.convert import run_conversion

    console = console_for(as_json)
    with job_events(console, verbose=verbose, quiet=quiet) as events:
        result = run_conversion(model, out, request, events)
    if as_json:
        print_json(result.to_json())
    elif quiet:
        click.echo(result.url or result.folder)
    else:
        show_result(console, result)
