"""docs/troubleshooting.md quotes messages as the code has them, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [
    message
    for row in PAGE.split("## What happens")[0].splitlines()
    if row.startswith("| `")
    for message in re.findall(r"`([^`]+)`", row.split("|")[1])
]
FROM_PYTHON = re.compile(r"cannot import name")


def code() -> str:
    """All of the package's source, string literals that go on in the next line put together."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "svdconvert").rglob("*.py")))
    return re.sub(r'"\n\s*f?"', "", text)


def test_messages_are_those_of_the_code() -> None:
    source = code()
    assert len(MESSAGES) > 20
    for message in MESSAGES:
        if FROM_PYTHON.match(message):
            continue
        for part in message.split("..."):
            assert part.strip() in source, message


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_it_is_linked(page: str) -> None:
    assert "(docs/troubleshooting.md)" in (ROOT / page).read_text(encoding="utf-8")


def test_links_lead_somewhere() -> None:
    for file, anchor in re.findall(r"\]\(([\w.]+)#?([\w-]*)\)", PAGE):
        text = (ROOT / "docs" / file).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles], (file, anchor)
