"""`svdconvert push`."""

from __future__ import annotations

from pathlib import Path

import click

from svdconvert.cli.parameters import (
    folder_argument,
    hub_revision_option,
    private_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import need_folder


@main.command()
@folder_argument
@click.argument("repo")
@private_option
@hub_revision_option
def push(folder: Path, repo: str, private: bool, hub_revision: str | None) -> None:
    """Upload a finished result to the Hub."""
    need_folder(folder)
    from svdconvert.commands.push import push as run

    click.echo(run(folder, repo, private=private, revision=hub_revision))
