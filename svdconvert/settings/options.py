"""All options of a conversion, and those of `svdconvert heal`, as tables, made from the fields of their requests.

No click and no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from svdconvert.settings.afterwards import Afterwards
from svdconvert.settings.healing import Healing
from svdconvert.settings.hub import Hub
from svdconvert.settings.output import Output
from svdconvert.settings.recipe import Recipe
from svdconvert.settings.row import Option, options_of
from svdconvert.settings.runtime import Runtime
from svdconvert.settings.scope import Scope
from svdconvert.settings.size import Size
from svdconvert.settings.text import Stats, Text


@dataclass(frozen=True, slots=True)
class RequestField:
    """One field of a request.

    Attributes:
        section: that it is a field of.
        field: its name there.
        option: how it is asked for.
    """

    section: type
    field: str
    option: Option


# In the order of the help.
SECTIONS = (Size, Scope, Recipe, Text, Stats, Afterwards, Output, Runtime, Hub)
FIELDS = tuple(RequestField(section, field, row) for section in SECTIONS for field, row in options_of(section).items())

# One for each option; fields without an option of their own are left out.
BY_KEYWORD: Mapping[str, RequestField] = {one.option.keyword: one for one in FIELDS if not one.option.part_of}

# The same with the options that `svdconvert heal` has of its own.
EVERY: Mapping[str, RequestField] = {
    **BY_KEYWORD,
    **{row.keyword: RequestField(Healing, field, row) for field, row in options_of(Healing).items()},
}

# Keyword -> option, and the options of other commands whose names differ from their keywords.
_NAMES: Mapping[str, str] = {
    **{keyword: one.option.flag for keyword, one in EVERY.items()},
    "calibration": "--calib",
    "methods": "--method",
    "layouts": "--layout",
    "plot": "--no-plot",
}


def option_name(field: str) -> str:
    """What the command line calls a keyword of the library.

    Args:
        field: a keyword of a public function, or ``calibration.`` and a field of a calibration.
    """
    return _NAMES.get(field, f"--{field.replace('_', '-')}")


def did_you_mean(word: str) -> str:
    """The end of a sentence about an unknown keyword; empty if no known keyword resembles it."""
    known = [*(keyword for keyword in BY_KEYWORD if "." not in keyword), "calibration"]
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def short_command(what: str, max_shard_bytes: int) -> str:
    """The command that repeats densify or fold, whose results depend on no option but the size of the files.

    Args:
        what: the command and its arguments.
        max_shard_bytes: of a weight file.
    """
    sized = options_of(Output)["max_shard_bytes"].command(max_shard_bytes)
    return " ".join(["svdconvert", what, *sized, "--out", "DIR"])
