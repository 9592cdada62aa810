"""An HTML page as a tree, parsed strictly, and the colours of its style."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

# Without an end tag; https://html.spec.whatwg.org/#void-elements
VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
# Attributes by which a page loads, runs or sends something.
LOADING = frozenset("src srcset action formaction poster data background cite ping manifest".split())


@dataclass
class Node:
    """An element: its attributes, elements in it, and the text of all of it."""

    name: str
    attributes: dict[str, str | None]
    children: list[Node] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    def all(self, name: str = "") -> Iterator[Node]:
        """All elements of a name below this one, in order."""
        for child in self.children:
            if not name or child.name == name:
                yield child
            yield from child.all(name)

    def named(self, name: str) -> Node:
        """The element with an id."""
        (found,) = [node for node in self.all() if node.attributes.get("id") == name]
        return found


class _Strict(HTMLParser):
    """A parser that takes no element without its end, and no attribute twice."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands there twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> ends {self.open[-1].name}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.pieces.append(data)


def parse(page: bytes) -> Node:
    """The tree of a page, which must be well-formed."""
    text = page.decode("utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    parser = _Strict()
    parser.feed(text)
    parser.close()
    assert [node.name for node in parser.open] == [""], "all elements end"
    (root,) = parser.root.children
    return root


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours ``#rrggbb``, https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    lighter, darker = sorted(map(_luminance, (first, second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def rules(style: str, dark: bool) -> dict[str, dict[str, str]]:
    """Selector -> property -> value of the rules for screens of a colour scheme, those for phones and paper aside."""
    found: dict[str, dict[str, str]] = {}
    heads: list[str] = []  # of the blocks that are open
    for text, brace in re.findall(r"([^{}]*)([{}])", re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)):
        if brace == "{":
            heads.append(text.strip())
            continue
        *outer, selectors = heads
        heads.pop()
        if selectors.startswith("@") or any("dark" not in query or not dark for query in outer):
            continue
        pairs = (line.split(":", 1) for line in text.split(";") if line.strip())
        said = {name.strip(): value.strip() for name, value in pairs}
        for selector in selectors.split(","):
            found.setdefault(selector.strip(), {}).update(said)
    assert not heads
    return found
