"""Help whose options stand in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from svdconvert.cli.types import COUNT, FILE, FOLDER

GROUPS = (
    "Size",
    "What to factor",
    "Method",
    "Calibration",
    "Healing",
    "Measuring",
    "Output",
    "Running",
    "Hub",
)


# What help says in the place of click's INTEGER, FLOAT and PATH.
_METAVARS = ((int, "N"), (float, "X"), (COUNT, "N"), (FOLDER, "FOLDER"), (FILE, "FILE"))

_Command = TypeVar("_Command", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that help shows under a heading.

    Attributes:
        group: one of :data:`GROUPS`.
    """

    def __init__(self, *args: Any, group: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group


class GroupedCommand(click.Command):
    """A command with its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in (*GROUPS, "Other")}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (row := parameter.get_help_record(ctx)) is not None:
                rows[getattr(parameter, "group", "Other")].append(row)
        for name, group in rows.items():
            if group:
                with formatter.section(name):
                    formatter.write_dl(group)


def option(*names: str, group: str, **settings: Any) -> Callable[[_Command], _Command]:
    """An option in a group of the help."""
    if "metavar" not in settings:
        settings["metavar"] = next((name for kind, name in _METAVARS if settings.get("type") is kind), None)
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def options(*decorators: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate
