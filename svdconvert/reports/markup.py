"""HTML and SVG elements as text. What is not markup is escaped, and characters that do not print are spelled out."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

from svdconvert.sentences import printable

# Elements that have no end tag.
_VOID = frozenset({"meta", "wbr"})


class Markup(str):
    """A text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def element(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element with its content.

    >>> element("td", "a < b", class_="map", data_x=None)
    '<td class="map">a &lt; b</td>'

    Args:
        name: of the tag.
        children: markup, text, numbers, lists of them; None is left out.
        attributes: ``class_`` is class, ``scroll_x`` scroll-x; those that are None or False are left out.
    """
    said = "".join(_attribute(key, value) for key, value in attributes.items())
    end = "" if name in _VOID else f"</{name}>"
    return Markup(f"<{name}{said}>{joined(children)}{end}")


def joined(children: Child) -> Markup:
    """Markup, text, numbers, or lists of them, one after the other."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int | float):
        return Markup(html.escape(printable(str(children))))
    return Markup("".join(map(joined, children)))


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(printable(str(value)))}"'
