"""The kinds of words on a command line, and how a shell completes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from svdconvert.methods.table import METHOD_ALIASES, METHODS


class Folder(click.Path):
    """A folder that need not be there yet; a file in its place is for the library to refuse, with what to do."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


FOLDER = Folder(path_type=Path)
FILE = click.Path(path_type=Path)
COUNT = click.IntRange(1)


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
