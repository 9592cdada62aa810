"""A translated page shows the commands, output and figures of the page it translates."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ("README", "examples/dialogue/README")


def shown(page: Path) -> list[str]:
    """Lines of code and output, without comments, which are translated."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line for line in rest.splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+# .*$", "", line).rstrip() for line in lines]


def figures(page: Path) -> list[Counter[str]]:
    """Rows of tables, each as its numbers."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [Counter(re.findall(r"\d[\d,.]*", row)) for row in rows]


def structure(page: Path) -> list[int]:
    """Levels of the headings."""
    return [len(mark) for mark in re.findall(r"^(#+) ", page.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_code_and_headings_are_the_same(page: str) -> None:
    english, korean = ROOT / f"{page}.md", ROOT / f"{page}.ko.md"
    # The command's placeholder may be a word of the language.
    assert [line for line in shown(korean) if "명령" not in line] == [
        line for line in shown(english) if "COMMAND" not in line
    ]
    assert structure(korean) == structure(english)


def test_the_figures_of_the_tables_are_the_same() -> None:
    english, korean = figures(ROOT / "README.md"), figures(ROOT / "README.ko.md")
    assert len(english) == len(korean)
    for one, other in zip(english, korean, strict=True):
        # "3.9 times less" is "3.9분의 1" in Korean: there may be a number more.
        assert one <= other


def links(page: Path) -> list[str]:
    """Pages that it leads to, their translations counted as themselves; not the one to its own other language."""
    found = re.findall(r"\]\(([^()\s]+)\)", page.read_text(encoding="utf-8"))
    return sorted({link.replace(".ko.md", ".md") for link in found} - {"README.md"})


@pytest.mark.parametrize("page", PAGES)
def test_links_are_the_same(page: str) -> None:
    # An anchor is a heading of the page that is linked, or of this one in its own language.
    one, other = ([link for link in links(ROOT / f"{page}{end}") if link[0] != "#"] for end in (".md", ".ko.md"))
    assert one == other
    assert len(one) > 3
