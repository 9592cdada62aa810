"""Where a command's result is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from svdconvert.errors import InputError
from svdconvert.settings.told import told


def need_folder(folder: Path) -> None:
    """Refuse a folder that does not exist.

    Raises:
        InputError: it does not exist.
    """
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{folder} is a file; give the folder that svdconvert wrote")
        raise InputError(f"there is no folder {folder}")


def console_for(as_json: bool) -> Any:
    """The console for people: standard output, or standard error while standard output carries JSON."""
    from rich.console import Console

    stream = sys.stderr if as_json else sys.stdout
    # Without a terminal lines are not wrapped: give tables the width they need.
    return Console(file=stream, width=None if stream.isatty() else 140)


def print_json(value: object) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(_told(value), indent=2, ensure_ascii=False))


def _told(value: object) -> object:
    """A value in JSON types with its sentences in the words of the command line."""
    if isinstance(value, Mapping):
        return {name: _told(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    return told(value) if isinstance(value, str) else value


@contextmanager
def job_events(options: dict[str, Any]) -> Iterator[Any]:
    """Progress of a job; takes ``verbose`` out of the options of its command."""
    from svdconvert.cli.progress import TerminalEvents

    with TerminalEvents(console_for(False), verbose=options.pop("verbose")) as events:
        yield events


def print_outcome(outcome: Any) -> None:
    """Say how a job ended."""
    from svdconvert.cli.report import show_outcome

    show_outcome(console_for(False), outcome)
