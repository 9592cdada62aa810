"""`svdconvert heal`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdconvert.cli.fields import ask, ask_all, take_calibration
from svdconvert.cli.groups import option, options
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
from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.healing import Healing, HealRequest
from svdconvert.settings.options import BY_KEYWORD
from svdconvert.settings.text import Text

# The text is not fitted to, so that it has no labels.
_TEXT = [word for word, one in BY_KEYWORD.items() if one.section is Text and one.field != "labels"]


@main.command()
@folder_argument
@option("--against", metavar="MODEL", required=True, group="Healing", help="The dense model that FOLDER was made from.")
@ask_all(Healing)
@options(*map(ask, _TEXT))
@option("--out", type=FOLDER, required=True, group="Output", help="Folder to write.")
@shard_option
@overwrite_option
@ask("check")
@device_option
@verbose_option
@quiet_option
@option("--against-revision", metavar="R", group="Hub", help="Branch, tag or commit of --against.")
def heal(
    folder: Path,
    against: str,
    out: Path,
    against_revision: str | None,
    no_check: bool,
    verbose: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Train the factors of FOLDER to the predictions of the dense model (`--calib` gives the text)."""
    need_folder(folder)
    calibration = take_calibration(values)
    if calibration is None:
        raise InputError(f"{asked('calibration')} is missing: the text to heal on")
    request = HealRequest.of(calibration, **values, check=not no_check)
    request.check()  # before torch is imported
    from svdconvert.commands.heal import run_healing

    with job_events(console_for(False), verbose=verbose, quiet=quiet) as events:
        outcome = run_healing(folder, against, out, request, against_revision, events)
    print_outcome(outcome, quiet=quiet)
