"""Help whose options stand in groups, and the kinds of words that a shell can complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from svdconvert.methods.table import METHOD_ALIASES, METHODS
from svdconvert.settings.options import BY_NAME

GROUPS = (
    "Size",
    "What to factor",
    "Method",
    "Calibration",
    "Measuring",
    "Output",
    "Running",
    "Hub",
)


class Folder(click.Path):
    """A folder that need not be there yet; a file in its place is for the library to refuse, with what to do."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


# What help says in the place of click's INTEGER, FLOAT and PATH.
FOLDER = Folder(path_type=Path)
FILE = click.Path(path_type=Path)
COUNT = click.IntRange(1)
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
    """An option in a group of the help; where nothing else is said, its default is that of the table."""
    known = next((BY_NAME[name] for name in names if name in BY_NAME), None)
    if known is not None and not known.is_flag and known.default not in (None, ()):
        settings = {"default": known.default, "show_default": True, **settings}
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


class Word(click.ParamType):
    """A text that is one of some known words; which ones is for the library to say.

    A click.Choice would refuse with the manual's sentence; the library's own says what is known and what to do.
    """

    name = "word"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """``[svd|asvd|...]``; click before 8.2 gives no context."""
        return f"[{'|'.join(self.words)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]


class MethodName(Word):
    """A method, or another name of one, which help does not repeat."""

    def __init__(self) -> None:
        super().__init__(tuple(METHODS))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = (*METHODS, *METHOD_ALIASES)
        return [
            CompletionItem(name) for name in names if incomplete and name.startswith(incomplete)
        ] or super().shell_complete(ctx, param, incomplete)


class Model(click.ParamType):
    """A model: a folder, a short name, or a repository on the Hub."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Short names here, and folders, which the shell knows."""
        from svdconvert.storage.opening import ALIASES

        names = [CompletionItem(name) for name in ALIASES if incomplete and name.startswith(incomplete)]
        return [*names, CompletionItem(incomplete, type="dir")]
