"""Links in the pages lead somewhere, and the front page stays one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.pages import PAGES, ROOT

_LINK = re.compile(r"\]\(([^()\s]+)\)")


def without_code(text: str) -> str:
    """Without fenced, indented and quoted code, where brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^    .*$|`[^`\n]*`", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings; what comes again has a number."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    names = Counter(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)
    return {*names, *(f"{name}-{again}" for name, count in names.items() for again in range(1, count))}


def broken(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for link in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (page.parent / file) if file else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_what_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One title, `code`\n\n```\n# none\n```\n## One\n## one\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#one-title-code) [c](gone.md) [d](there.md#none) [e](#f) "
        "[j](there.md#one-1) [k](there.md#one-2) [g](https://x.y)\n\n"
        "    [h](i)\n"
    )
    assert broken(page) == ["gone.md", "there.md#none", "#f", "there.md#one-2"]


def test_every_page_is_reached() -> None:
    """From the front page, over links."""
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in _LINK.findall(without_code(page.read_text(encoding="utf-8"))):
            target = (page.parent / unquote(link).partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in reached:
                waiting.append(target)
    assert {page for page in PAGES if page.parent.name != "model"} <= reached


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_front_page_is_short(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_begin_with_a_title(page: Path) -> None:
    title, empty, first, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert not empty
    assert re.match(r"[\w`*\[]", first), "what the page is for"


def test_pages_that_the_code_names_are_there() -> None:
    named = {
        name
        for folder in ("svdconvert", "modeling", "tests", "examples")
        for file in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text(encoding="utf-8"))
    }
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
