"""`svdconvert verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    folder_argument,
    json_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, need_folder, print_json
from svdconvert.cli.types import FILE
from svdconvert.errors import InputError, JobError


@main.command()
@folder_argument
@option("--against", metavar="MODEL", group="Measuring", help="The dense source, to compare every tensor with.")
@option("--revision", metavar="R", group="Hub", help="Branch, tag or commit of --against.")
@option("--text", type=FILE, group="Measuring", help="Text for the perplexity of the model, and of --against.")
@device_option
@json_option
def verify(
    folder: Path, against: str | None, revision: str | None, text: Path | None, device: str, as_json: bool
) -> None:
    """Check a factored checkpoint: files, ranks, logits, and every tensor against the dense source."""
    need_folder(folder)
    if revision and not against:
        raise InputError("--revision belongs to --against")
    from svdconvert.commands.evaluate import evaluate as measure
    from svdconvert.commands.verify import failed
    from svdconvert.commands.verify import verify as run

    checks = run(folder, against, revision)
    evaluations = []
    if text is not None:
        evaluations = [measure(folder, text, device=device)]
        if against:
            evaluations.append(measure(against, text, revision=revision, device=device))
    if as_json:
        print_json(
            {
                "passed": not failed(checks),
                "checks": [dataclasses.asdict(check) for check in checks],
                "evaluations": [evaluation.to_json() for evaluation in evaluations],
            }
        )
    else:
        from rich.markup import escape

        from svdconvert.cli.report import show_checks, show_evaluation

        console = console_for(as_json)
        show_checks(console, checks)
        for evaluation in evaluations:
            console.print(f"[bold]{escape(evaluation.model)}[/]")
            show_evaluation(console, evaluation)
    if failed(checks):
        raise JobError(f"{folder} did not pass: {', '.join(check.name for check in failed(checks))}")
