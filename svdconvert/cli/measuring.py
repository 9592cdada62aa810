"""The commands that look at a model: verify, evaluate, ablate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from svdconvert.cli.groups import FILE, option
from svdconvert.cli.parameters import (
    device_option,
    folder_argument,
    json_option,
    model_argument,
    revision_option,
    split_option,
    targets_option,
    window_options,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, need_folder, print_json
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
        from svdconvert.cli.report import show_checks, show_evaluation

        console = console_for(as_json)
        show_checks(console, checks)
        for evaluation in evaluations:
            console.print(f"[bold]{evaluation.model}[/]")
            show_evaluation(console, evaluation)
    if failed(checks):
        raise JobError(f"{folder} did not pass: {', '.join(check.name for check in failed(checks))}")


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
