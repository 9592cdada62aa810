"""Modeling files, each compiled once, as all copies of a family's are alike; Python compiles every copy."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from types import CodeType
from typing import Any

_to_code = SourceFileLoader.source_to_code


def compile_once(folder: str) -> None:
    """Remember what is compiled of the files below a folder, by their content."""
    codes: dict[bytes, CodeType] = {}

    def remembered(self: SourceFileLoader, data: Any, path: Any, **options: Any) -> Any:
        if not str(path).startswith(folder):
            return _to_code(self, data, path, **options)
        content = bytes(data)
        if content not in codes:
            codes[content] = _to_code(self, data, path, **options)
        return codes[content]

    SourceFileLoader.source_to_code = remembered  # type: ignore[method-assign, assignment]
