"""Commands in the pages are commands that there are, with options that they have."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from support.pages import PAGES, ROOT

from svdconvert.cli.app import main

_SHOWN = re.compile(r"^ {4}(?:torchrun .* -m )?(svdconvert .*)$", re.MULTILINE)
_QUOTED = re.compile(r"`(svdconvert [^`]+)`")


def commands(page: Path) -> list[str]:
    """Calls of the program on a page, continued lines put together."""
    text = re.sub(r" *\\\n +", " ", page.read_text(encoding="utf-8"))
    return [*_SHOWN.findall(text), *(" ".join(found.split()) for found in _QUOTED.findall(text))]


def unknown(call: str) -> list[str]:
    """The options of a call that its command does not have."""
    words = shlex.split(call.partition("  #")[0])[1:]
    name = words[0] if words[0] in main.commands or words[0].startswith("-") else "convert"
    command: click.Command = main if name.startswith("-") else main.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "--version"}
    return [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]


CALLS = [
    pytest.param(call, id=f"{page.relative_to(ROOT)}: {call[:60]}")
    for page in PAGES
    if page.name != "CHANGELOG.md"
    for call in dict.fromkeys(commands(page))
]


@pytest.mark.parametrize("call", CALLS)
def test_options_are_known(call: str) -> None:
    assert unknown(call) == []


def test_what_would_be_found() -> None:
    assert len(CALLS) > 50
    assert unknown("svdconvert MODEL --rank 3 --ranks 4 --out DIR") == ["--ranks"]
    assert unknown("svdconvert plan MODEL --refit sequential") == ["--refit"]
    assert {name for name in main.commands if any(f"svdconvert {name} " in call.values[0] for call in CALLS)} >= (
        set(main.commands) - {"convert"}
    )
