"""Options made from the fields of a request, and the request from their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from svdconvert.cli.groups import option, options
from svdconvert.cli.types import COUNT, FOLDER, MethodName, Word
from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.options import BY_KEYWORD, EVERY
from svdconvert.settings.row import Kind, Option
from svdconvert.settings.size import parse_rank_options
from svdconvert.settings.text import Text

if TYPE_CHECKING:
    from svdconvert.calibration.knowledge import Calibration

_Command = TypeVar("_Command", bound=Callable[..., Any])

_TYPES: dict[Kind, Callable[[Option], Any]] = {
    "text": lambda row: str,
    "whole": lambda row: int,
    "count": lambda row: COUNT,
    "number": lambda row: float,
    "folder": lambda row: FOLDER,
    "path": lambda row: click.Path(),
    "choice": lambda row: click.Choice(row.words),
    "word": lambda row: Word(row.words),
    "method": lambda row: MethodName(),
}


def parameter_name(row: Option) -> str:
    """Click's name for the value."""
    return ("no_" if row.default is True else "") + row.keyword.replace(".", "_")


def ask(keyword: str, *, name: str = "", **changes: Any) -> Callable[[_Command], _Command]:
    """The option of a field.

    Args:
        keyword: a key of :data:`svdconvert.settings.options.EVERY`.
        name: click's name for the value, by default made from the keyword.
        changes: click settings that differ from the field's.
    """
    row = EVERY[keyword].option
    usual = f"  [default: {row.usual}]" if row.usual else ""
    said: dict[str, Any] = {"group": row.group, "help": row.help + usual}
    if row.kind == "flag":
        said["is_flag"] = True
    else:
        said |= {"type": _TYPES[row.kind](row), "multiple": row.repeatable}
        if row.default not in (None, ()):
            said |= {"default": row.write(row.default)[0], "show_default": True}
    if row.metavar:
        said["metavar"] = row.metavar
    return option(row.flag, name or parameter_name(row), **(said | changes))


def ask_all(*sections: type) -> Callable[[_Command], _Command]:
    """The options of all fields of some sections, in their order."""
    return options(*(ask(keyword) for keyword, one in EVERY.items() if one.section in sections))


def take_calibration(values: dict[str, Any]) -> Calibration | None:
    """Take the options of the text out of all; None without a text.

    Raises:
        InputError: there is no such text; or without a text, one of its options is given.
    """
    prefix = "calibration_"
    chosen = {name.removeprefix(prefix): values.pop(name) for name in list(values) if name.startswith(prefix)}
    if chosen["text"] is not None:
        Text(**chosen).check()
        from svdconvert.calibration.knowledge import Calibration

        return Calibration(**chosen)
    for name, value in chosen.items():
        if value != BY_KEYWORD[f"calibration.{name}"].option.default:
            raise InputError(
                f"{asked(f'calibration.{name}')} has no effect without {asked('calibration')}; give the text as "
                "well, or leave it out"
            )
    return None


def conversion_of(values: dict[str, Any]) -> Conversion:
    """The request given by the options of ``convert`` or ``plan``.

    Args:
        values: by click's names.
    """
    values = dict(values)
    default, patterns = parse_rank_options(values.pop("rank"))
    given: dict[str, Any] = {"rank": patterns if default is None else {**patterns, "*": default}}
    if "calibration_text" in values:
        given["calibration"] = take_calibration(values)
    for keyword, one in BY_KEYWORD.items():
        name = parameter_name(one.option)
        if name in values and keyword not in given:
            value = values.pop(name)
            given[keyword] = not value if one.option.default is True else value
    assert not values, values
    return Conversion.of(**given)
