"""`svdconvert densify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    folder_argument,
    overwrite_option,
    quiet_option,
    shard_option,
    verbose_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, job_events, need_folder, print_outcome
from svdconvert.cli.types import FOLDER


@main.command()
@folder_argument
@option("--out", type=FOLDER, required=True, group="Output", help="Folder to write.")
@shard_option
@device_option
@overwrite_option
@verbose_option
@quiet_option
def densify(folder: Path, out: Path, verbose: bool, quiet: bool, **options: Any) -> None:
    """Multiply the factors out: back to the stock architecture, for GGUF and engines without remote code."""
    need_folder(folder)
    from svdconvert.commands.densify import densify as run

    with job_events(console_for(False), verbose=verbose, quiet=quiet) as events:
        outcome = run(folder, out, **options, events=events)
    print_outcome(outcome, quiet=quiet)
