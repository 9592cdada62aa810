"""Spares a process of tests work that no test sees, once what it imports is there."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def settle() -> None:
    """Leave modules out of the search for garbage, first values out of models without memory, and parse a file once."""
    if "torch" in sys.modules:
        _draw_only_what_has_memory()
    if "transformers" in sys.modules:
        _parse_once()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def _draw_only_what_has_memory() -> None:
    """On the meta device torch goes through the drawing of numbers in Python, for half of the time of such a model."""
    from torch.nn import init

    tables: list[dict[str, Any]] = [vars(init)]
    if "transformers.initialization" in sys.modules:
        tables.append(sys.modules["transformers.initialization"].TORCH_INIT_FUNCTIONS)

    def drawn(draw: Callable[..., Any]) -> Callable[..., Any]:
        def given(tensor: Any, *args: Any, **options: Any) -> Any:
            return tensor if tensor.is_meta else draw(tensor, *args, **options)

        return given

    for name in ("normal_", "uniform_", "kaiming_uniform_"):
        for table in tables:
            table[name] = drawn(table[name])


def _parse_once() -> None:
    """At every load, transformers parses the modeling file for what it imports; all copies of a family's are alike."""
    from transformers import dynamic_module_utils

    def remembered(find: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
        known: dict[bytes, list[str]] = {}

        def found(file: Any) -> list[str]:
            content = Path(file).read_bytes()
            if content not in known:
                known[content] = find(file)
            return known[content]

        return found

    for name in ("get_imports", "get_relative_imports"):
        setattr(dynamic_module_utils, name, remembered(getattr(dynamic_module_utils, name)))
