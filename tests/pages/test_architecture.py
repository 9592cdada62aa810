"""docs/architecture.md draws the rooms that there are."""

from __future__ import annotations

import re
from pathlib import Path

from support.rooms import GROUND, PACKAGE, ROOMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_picture_has_the_rooms() -> None:
    """The roof first, as houses are drawn."""
    drawn = re.findall(r"^    (\w+)  +\S", PAGE.partition("## The journey")[0], re.MULTILINE)
    assert drawn == list(reversed(ROOMS))


def test_what_lies_beside_them_is_named() -> None:
    beside = re.search(r"^Beside the rooms lie (.+?)\.", PAGE, re.MULTILINE | re.DOTALL)
    assert beside is not None
    named = set(re.findall(r"\w+", beside[1].partition(": ")[2])) - {"and"}
    assert named == GROUND - {"modeling"}


def test_what_it_names_is_there() -> None:
    named = re.findall(r"`((?:svdconvert|tests|modeling)/[\w/.]*)`", PAGE)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_journey_passes_rooms_alone() -> None:
    journey = PAGE.partition("## The journey")[2].partition("## Where")[0]
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert set(ROOMS) & set(re.findall(r"`(\w+)`", journey)) >= folders & set("cli storage planning jobs".split())
