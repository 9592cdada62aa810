"""`svdconvert ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    json_option,
    model_argument,
    revision_option,
    split_option,
    targets_option,
    window_options,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, print_json
from svdconvert.cli.types import FILE


@main.command()
@model_argument
@option("--text", type=FILE, required=True, group="Measuring", help="UTF-8 text file.")
@option("--groups", type=int, default=10, show_default=True, group="Measuring", help="Groups of singular values.")
@targets_option
@split_option
@window_options
@revision_option
@device_option
@json_option
def ablate(model: str, text: Path, as_json: bool, **options: Any) -> None:
    """What the singular values are worth: perplexity without each group of them in turn."""
    from svdconvert.cli.progress import TerminalEvents
    from svdconvert.cli.report import show_ablation
    from svdconvert.commands.ablate import ablate as run

    console = console_for(as_json)
    with TerminalEvents(console) as events:
        results = run(model, text, **options, events=events)
    if as_json:
        print_json([result.to_json() for result in results])
    else:
        show_ablation(console, results)
