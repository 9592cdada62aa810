"""The commands for what a conversion has written: densify, fold, push."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from svdconvert.cli.groups import FOLDER, option
from svdconvert.cli.parameters import (
    device_option,
    folder_argument,
    hub_revision_option,
    overwrite_option,
    private_option,
    shard_option,
    verbose_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, need_folder


@contextmanager
def _job_events(options: dict[str, Any]) -> Iterator[Any]:
    from svdconvert.cli.progress import TerminalEvents

    with TerminalEvents(console_for(False), verbose=options.pop("verbose")) as events:
        yield events


def _show_outcome(outcome: Any) -> None:
    from svdconvert.cli.report import show_outcome

    show_outcome(console_for(False), outcome)


@main.command()
@folder_argument
@option("--out", type=FOLDER, required=True, group="Output", help="Folder to write.")
@shard_option
@device_option
@overwrite_option
@verbose_option
def densify(folder: Path, out: Path, **options: Any) -> None:
    """Multiply the factors out: back to the stock architecture, for GGUF and engines without remote code."""
    need_folder(folder)
    from svdconvert.commands.densify import densify as run

    with _job_events(options) as events:
        outcome = run(folder, out, **options, events=events)
    _show_outcome(outcome)


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
def fold(folder: Path, adapter: Path, out: Path, **options: Any) -> None:
    """Merge a LoRA adapter exactly into the factors: the ranks grow by the adapter's."""
    need_folder(folder)
    from svdconvert.commands.fold import fold as run

    with _job_events(options) as events:
        outcome = run(folder, adapter, out, **options, events=events)
    _show_outcome(outcome)


@main.command()
@folder_argument
@click.argument("repo")
@private_option
@hub_revision_option
def push(folder: Path, repo: str, private: bool, hub_revision: str | None) -> None:
    """Upload a finished result to the Hub."""
    need_folder(folder)
    from svdconvert.commands.convert import push as run

    click.echo(run(folder, repo, private=private, revision=hub_revision))
