"""`svdconvert evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    json_option,
    model_argument,
    revision_option,
    window_options,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, print_json
from svdconvert.cli.types import FILE
from svdconvert.errors import InputError


@main.command()
@model_argument
@option("--text", type=FILE, required=True, group="Measuring", help="UTF-8 text file.")
@option(
    "--against",
    metavar="MODEL",
    group="Measuring",
    help="The dense model: how far the predictions are from its own (KL divergence); both are then in memory.",
)
@option("--against-revision", metavar="R", group="Hub", help="Branch, tag or commit of --against.")
@option(
    "--protocol",
    type=click.Choice(["sliding", "disjoint"]),
    default="sliding",
    show_default=True,
    group="Measuring",
    help="Windows that overlap, or that do not (2048 tokens by default), as papers read WikiText-2.",
)
@window_options
@revision_option
@device_option
@json_option
def evaluate(model: str, text: Path, as_json: bool, **options: Any) -> None:
    """Perplexity of MODEL, dense or factored, on a text, and how faithful it is to the dense model."""
    if options["against_revision"] and not options["against"]:
        raise InputError("--against-revision belongs to --against")
    from svdconvert.cli.progress import counting
    from svdconvert.cli.report import show_evaluation
    from svdconvert.commands.evaluate import evaluate as run

    console = console_for(as_json)
    with counting(console, "tokens") as progress:
        result = run(model, text, **options, progress=progress)
    if as_json:
        print_json(result.to_json())
    else:
        show_evaluation(console, result)
