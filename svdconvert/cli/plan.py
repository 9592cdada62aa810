"""`svdconvert plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdconvert.cli.fields import conversion_of
from svdconvert.cli.groups import option
from svdconvert.cli.parameters import json_option, model_argument, plan_options
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, print_json
from svdconvert.cli.types import FOLDER
from svdconvert.settings.conversion import Conversion


@main.command()
@model_argument
@option("--out", type=FOLDER, group="Output", help="Folder that would be written, for the disk's free room.")
@plan_options
@json_option
def plan(model: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Say what a conversion would do, from config and headers alone.

    For a Hub repository only headers are downloaded; a folder with nothing but config.json will do.
    """
    print_plan(model, out, as_json, conversion_of(options))


def print_plan(model: str, out: Path | None, as_json: bool, request: Conversion) -> None:
    """Plan, and show the plan.

    Args:
        model: as the user names it.
        out: where the result would go; its disk's free room is shown.
        as_json: whether a program reads it.
        request: what is asked for.
    """
    from svdconvert.cli.report import show_plan
    from svdconvert.commands.plan import plan_conversion
    from svdconvert.storage.disk import free_bytes

    made = plan_conversion(model, request)
    if as_json:
        print_json(made.to_json())
    else:
        show_plan(console_for(as_json), made, free_bytes(out or Path()))
