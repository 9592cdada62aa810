"""`svdconvert calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from svdconvert.cli.fields import ask, ask_all, take_calibration
from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    model_argument,
    quiet_option,
    revision_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, job_events
from svdconvert.cli.types import FOLDER
from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.text import Text


@main.command()
@model_argument
@option("--out", type=FOLDER, required=True, group="Output", help="Folder to write the statistics to.")
@ask(
    "method",
    name="methods",
    multiple=True,
    default=["kfac"],
    show_default=True,
    help="What they are for (repeatable).",
)
@ask_all(Text)
@revision_option
@device_option
@quiet_option
def calibrate(
    model: str, out: Path, methods: Sequence[str], revision: str | None, device: str, quiet: bool, **text: Any
) -> None:
    """Collect the statistics of data-aware methods once, for many conversions (`--stats`)."""
    calibration = take_calibration(text)
    if calibration is None:
        raise InputError(f"{asked('calibration')} is missing: the text to collect statistics from")
    from svdconvert.commands.calibrate import calibrate as run

    with job_events(console_for(False), quiet=quiet) as events:
        run(model, calibration, out, methods=methods, revision=revision, device=device, events=events)
    click.echo(out if quiet else f"statistics written to {out}")
