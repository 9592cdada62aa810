"""`svdconvert fold`."""

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
@option(
    "--adapter", type=FOLDER, required=True, group="What to factor", help="Folder that peft's save_pretrained wrote."
)
@option("--out", type=FOLDER, required=True, group="Output", help="Folder to write.")
@shard_option
@device_option
@overwrite_option
@verbose_option
@quiet_option
def fold(folder: Path, adapter: Path, out: Path, verbose: bool, quiet: bool, **options: Any) -> None:
    """Merge a LoRA adapter exactly into the factors: the ranks grow by the adapter's."""
    need_folder(folder)
    from svdconvert.commands.fold import fold as run

    with job_events(console_for(False), verbose=verbose, quiet=quiet) as events:
        outcome = run(folder, adapter, out, **options, events=events)
    print_outcome(outcome, quiet=quiet)
