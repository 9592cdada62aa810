"""A whole page: one file that needs nothing else, and may not ask for anything else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from svdconvert.reports.markup import Markup, element, joined
from svdconvert.version import __version__

_BEGINNING = b"<!DOCTYPE html>"
# A page of ours says in its head, of which there is nothing from outside yet, what wrote it.
_GENERATOR = re.compile(
    rb'%b\n<html lang="en"><head>(?:<meta [^<>]*>)*?<meta name="generator" content="svdconvert ' % _BEGINNING
)
# Its first bytes, which reach beyond that.
HEAD_BYTES = 4096


def document(title: str, parts: Sequence[Markup | None], *, made_of: str) -> bytes:
    """The page, in UTF-8.

    Args:
        title: of the window.
        parts: header, sections, in their order.
        made_of: file that it was made of.
    """
    style = _style()
    # Nothing is fetched, run or sent; and of styles, only this one counts.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"svdconvert {__version__}"),
        element("title", title),
        element("style", Markup(style)),
    )
    first, *rest = [part for part in parts if part is not None]
    body = element("body", first, _links(rest), element("main", rest), _foot(made_of))
    page = element("html", head, body, lang="en")
    return b"%b\n%b\n" % (_BEGINNING, page.encode())


def is_page(beginning: bytes) -> bool:
    """Whether a file is a page that :func:`document` made, of any version.

    Args:
        beginning: the file's first :data:`HEAD_BYTES` bytes.
    """
    return _GENERATOR.match(beginning) is not None


def _links(parts: Sequence[Markup]) -> Markup:
    """Links to the sections, by their headings."""
    heading = r'<section id="(\w+)"[^>]*><h2 id="\w+-title">(.*?)</h2>'
    found = [match for part in parts if (match := re.match(heading, part))]
    entries = [element("li", element("a", Markup(match[2]), href=f"#{match[1]}")) for match in found]
    return element("nav", element("ul", entries), aria_label="Sections")


def _foot(made_of: str) -> Markup:
    text = f"This page was made of {made_of} by svdconvert {__version__}. It needs nothing but this file."
    return element("footer", element("p", text))


@cache
def _style() -> str:
    """style.css without comments and indentation."""
    text = files("svdconvert.reports").joinpath("style.css").read_text(encoding="utf-8")
    return joined(Markup(re.sub(r"\n\s*", "\n", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)).strip()))
