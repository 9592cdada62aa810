"""What the commands of this example have in common: errors in one sentence, with an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from svdconvert.errors import SvdconvertError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Plain(click.Command):
    """Tells a user's mistake without a traceback: exit code 2 for bad input, 1 for work that can be continued."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SvdconvertError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)


class Command(_Plain):
    """A command with such errors."""


class Group(_Plain, click.Group):
    """A group of commands with such errors."""
