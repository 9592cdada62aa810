"""docs/api.md from the docstrings of ``svdconvert.__all__``.

python docs/make_api.py
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import svdconvert

PAGE = Path(__file__).with_name("api.md")

_HEAD = """# Python API

Everything that `svdconvert` exports, made from the docstrings by `make pages`. Examples:
[From Python](python.md).
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_TITLES = {"Args": "Arguments"}
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")
_ENTRY = re.compile(r"(\*{0,2}\w+(?:, ?\*{0,2}\w+)*): (.*)", re.DOTALL)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    exported = [(name, getattr(svdconvert, name)) for name in svdconvert.__all__]
    errors = [pair for pair in exported if _is_error(pair[1])]
    classes = [pair for pair in exported if inspect.isclass(pair[1]) and pair not in errors]
    functions = [pair for pair in exported if not inspect.isclass(pair[1])]
    parts = [_HEAD]
    for title, pairs in (("Functions", functions), ("Classes", classes), ("Errors", errors)):
        links = ", ".join(f"[{name}](#{anchor(name)})" for name, _ in pairs)
        parts.append(f"## {title}\n\n{links}\n")
        parts += [entry(name, thing) for name, thing in pairs]
    return "\n".join(parts)


def anchor(name: str) -> str:
    """Where a link to an entry leads; of two headings that differ in their case alone, the second has a number."""
    second = name != name.lower() and name.lower() in svdconvert.__all__
    return f"{name.lower()}-1" if second else name.lower()


def entry(name: str, thing: Any) -> str:
    """One function or class: its call, its docstring, and what a class has besides its attributes."""
    lines = [f"### {name}\n"]
    if not _is_error(thing):
        lines.append(f"```python\n{call(name, thing)}\n```\n")
    lines.append(prose(inspect.getdoc(thing) or ""))
    if inspect.isclass(thing):
        members = list(_members(thing))
        if members:
            lines.append("Properties and methods:\n\n" + "\n".join(members) + "\n")
    return "\n".join(lines)


def call(name: str, thing: Any) -> str:
    """How it is called, a line per argument where one line is too long."""
    signature = inspect.signature(thing)
    shown, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        shown.append(_parameter(parameter))
    returned = signature.return_annotation
    end = "" if inspect.isclass(thing) or returned is signature.empty else f" -> {_type(returned)}"
    short = f"{name}({', '.join(shown)}){end}"
    return short if len(short) <= 100 else f"{name}(\n" + "".join(f"    {line},\n" for line in shown) + f"){end}"


def prose(doc: str) -> str:
    """A docstring in Markdown: its sections as lists."""
    body, section = [], ""
    for block in re.split(r"\n\n+", doc):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in _SECTIONS and head.endswith(":"):
            section = head.rstrip(":")
            body.append(f"{_TITLES.get(section, section)}:\n")
            body.append(_listed(inspect.cleandoc("\n" + rest)))
        elif block.startswith("    ") and section:
            body.append(_listed(inspect.cleandoc("\n" + block)))
        else:
            body.append(_code(block) + "\n")
    return "\n".join(body)


def _listed(text: str) -> str:
    """``name: what`` entries, whose further lines are indented, as a list; any other text as it is."""
    entries = re.split(r"\n(?! )", text)
    found = [_ENTRY.match(" ".join(one.split())) for one in entries]
    if not all(found):
        return _code(" ".join(text.split())) + "\n"
    rows = []
    for match in found:
        assert match is not None
        names = ", ".join(f"`{name}`" for name in re.split(r", ?", match[1]))
        rows.append(f"* {names}: {_code(match[2])}")
    return "\n".join(rows) + "\n"


def _members(cls: type) -> Iterator[str]:
    """Those that have a docstring of their own: the others are among the attributes."""
    for name, member in vars(cls).items():
        public = not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
        if not public or not member.__doc__:
            continue
        shown = name if isinstance(member, property) else call(name, member).replace("self, ", "").replace("self", "")
        doc = re.split(r"\n\n(?:Args|Returns|Raises):", inspect.getdoc(member) or "")[0]
        yield f"* `{' '.join(shown.split())}`: {_code(' '.join(doc.split()))}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {_value(parameter.default)}"


def _value(value: Any) -> str:
    """A default, without addresses, which change from run to run."""
    if isinstance(value, enum.Enum) or not isinstance(value, str | int | float | tuple | list | dict | type(None)):
        return "..."
    return repr(value).replace("'", '"')


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _code(text: str) -> str:
    """Roles and double backquotes as Markdown has them."""

    def linked(role: re.Match[str]) -> str:
        name = role[1].removeprefix("svdconvert.")
        exported = name.partition(".")[0]
        return f"[`{name}`](#{anchor(exported)})" if exported in svdconvert.__all__ else f"`{role[1]}`"

    return _ROLE.sub(linked, text).replace("``", "`")


def _is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Exception)


if __name__ == "__main__":
    main()
