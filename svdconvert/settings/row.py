"""How a field of a request is asked for: its option on the command line, its help, and its words in a command."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any, Literal

from svdconvert.errors import InputError
from svdconvert.paths import path_or_text
from svdconvert.sentences import asked

Kind = Literal["flag", "text", "whole", "count", "number", "folder", "path", "choice", "word", "method"]

# Why the command of a model card leaves a field out.
SPEED = "where and how fast it is computed"
PLACE = "where things are kept"
HUB = "what becomes of the finished result"


# In the place of a default: the object cannot be made without the field.
REQUIRED = MISSING


def one_word(value: Any) -> list[str]:
    """A value as one word of a command line, from which the same value is read again."""
    return [repr(value) if isinstance(value, float) else str(value)]


def as_given(value: Any) -> Any:
    """A value that needs no reading."""
    return value


def unknown(keyword: str, value: Any, words: Sequence[str]) -> InputError:
    """What to say of a value that is none of the known words."""
    *others, last = words
    return InputError(f"{asked(keyword, value)} is unknown; choose {', '.join(others)} or {last}")


def count(keyword: str, value: Any) -> int:
    """A whole number from 1 on, likewise.

    Raises:
        InputError: it is something else.
    """
    value = whole(keyword, value)
    if value < 1:
        raise InputError(f"{asked(keyword, value)} is too small; the least is 1")
    return value


def whole(keyword: str, value: Any, shown: Any = None) -> int:
    """A whole number as a caller of the library gives it, of numpy too.

    Args:
        keyword: of :func:`svdconvert.convert`.
        value: what was given.
        shown: the value in a message, where it is a part of what was given.

    Raises:
        InputError: it is something else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{asked(keyword, value if shown is None else shown)} is not a whole number") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """The option of a field.

    Attributes:
        flag: on the command line.
        keyword: of :func:`svdconvert.convert`; ``calibration.`` and a field of :class:`svdconvert.Calibration`.
        group: heading in the help.
        help: what it does.
        kind: of its value: ``count`` is a whole number from 1 on, ``choice`` one of the known words, ``word`` a text
            for which the known words are examples, ``method`` a row of :data:`svdconvert.methods.table.METHODS`.
        metavar: stands for the value in the help; by default the kind's.
        words: known values.
        usual: the default in words, where it depends on other fields or on the model.
        repeatable: whether it may be given more than once.
        default: of the field.
        read: value as a caller gives it -> value of the field.
        write: value of the field -> one word for each time that the option is given.
        part_of: the field whose option gives this value too; empty for a field with an option of its own.
        omitted_because: why the command of a model card leaves the field out; empty for a field that the result
            depends on.
    """

    flag: str
    keyword: str
    group: str
    help: str
    kind: Kind = "text"
    metavar: str = ""
    words: tuple[str, ...] = ()
    usual: str = ""
    repeatable: bool = False
    default: Any = None
    read: Callable[[Any], Any] = as_given
    write: Callable[[Any], Sequence[str]] = one_word
    part_of: str = ""
    omitted_because: str = ""

    def given(self, value: Any) -> Any:
        """The value of the field, from what a caller gives.

        Raises:
            InputError: it is not of this kind.
        """
        if value is None and self.default is None:
            return None
        if self.kind == "whole":
            value = whole(self.keyword, value)
        elif self.kind == "count":
            value = count(self.keyword, value)
        elif self.kind == "flag" and not isinstance(value, bool):
            raise InputError(f"{asked(self.keyword, value)} is neither True nor False; give one of them")
        elif self.kind == "path":
            value = str(path_or_text(value))
        elif self.kind == "text" and self.read is as_given and not isinstance(value, str):
            raise InputError(f"{asked(self.keyword, value)} is not text; write it in quotes")
        elif self.kind == "number" and (isinstance(value, bool) or not isinstance(value, Real)):
            raise InputError(f"{asked(self.keyword, value)} is not a number")
        return self.read(value)

    def command(self, value: Any) -> list[str]:
        """Words of a command line that give a value; none for the default."""
        if value == self.default:
            return []
        if self.kind == "flag":
            return [self.flag]
        return [word for one in self.write(value) for word in (self.flag, one)]


def option(default: Any, flag: str, help: str = "", *, keyword: str, group: str, **more: Any) -> Any:
    """A dataclass field with its option.

    Args:
        default: of the field; :data:`REQUIRED` for none.
        flag, help, keyword, group, more: see :class:`Option`.
    """
    shown = None if default is REQUIRED else default
    row = Option(flag=flag, help=help, keyword=keyword, group=group, default=shown, **more)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"option": row})
    return field(metadata={"option": row}) if default is REQUIRED else field(default=default, metadata={"option": row})


def options_of(section: Any) -> Mapping[str, Option]:
    """Field -> option, in the order of the fields.

    Args:
        section: a settings class, or an object of one.
    """
    return {one.name: one.metadata["option"] for one in fields(section) if "option" in one.metadata}
