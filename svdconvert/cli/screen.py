"""Where a command's result is printed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from svdconvert.errors import InputError
from svdconvert.sentences import asked
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
    from svdconvert.cli.tables import PlainConsole

    stream = sys.stderr if as_json else sys.stdout
    # Without a terminal lines are not wrapped: give tables the width they need.
    return PlainConsole(file=stream, width=None if stream.isatty() else 140)


def print_json(value: object) -> None:
    """Print a value for programs."""
    text = json.dumps(_told(value), indent=2, ensure_ascii=False)
    # a terminal may obey what JSON does not escape by itself
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def _told(value: object) -> object:
    """A value in JSON types with its sentences in the words of the command line."""
    if isinstance(value, Mapping):
        return {name: _told(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_told(one) for one in value]
    return told(value) if isinstance(value, str) else value


@contextmanager
def job_events(console: Any, *, verbose: bool = False, quiet: bool = False) -> Iterator[Any]:
    """Progress of a job.

    Args:
        console: where it is shown.
        verbose: with a line for every matrix.
        quiet: not at all, and no downloads are announced.

    Raises:
        InputError: it is to be both.
    """
    from svdconvert.cli.progress import QuietEvents, TerminalEvents

    if not quiet:
        with TerminalEvents(console, verbose=verbose) as events:
            yield events
        return
    if verbose:
        raise InputError(f"{asked('quiet')} and {asked('verbose')} exclude each other; leave one of them out")
    logger = logging.getLogger("svdconvert")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield QuietEvents()
    finally:
        logger.setLevel(level)


def print_outcome(outcome: Any, *, quiet: bool) -> None:
    """Say how a job ended, or where its result is."""
    from svdconvert.cli.report import show_outcome

    if quiet:
        click.echo(outcome.folder)
    else:
        show_outcome(console_for(False), outcome)
