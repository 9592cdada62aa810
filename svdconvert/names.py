"""Reading the names of modules and tensors."""

from __future__ import annotations

import re
from typing import Any


def suffix(module: str) -> str:
    """``layers.3.attention.dense`` -> ``attention.dense``."""
    return re.sub(r"^.*?\.\d+\.", "", module)


def kind(module: str) -> str:
    """The same for all experts of a mixture: ``layers.3.mlp.experts.7.up_proj`` -> ``mlp.experts.*.up_proj``."""
    return re.sub(r"\.\d+\.", ".*.", suffix(module))


def layer_number(module: str) -> int:
    """``layers.3.attention.dense`` -> 3; -1 outside of layers."""
    match = re.search(r"\.(\d+)\.", module)
    return int(match[1]) if match else -1


def expert(name: str) -> str:
    """``layers.3.mlp.experts.7.up_proj`` -> ``layers.3.mlp.experts.7``; empty outside of experts."""
    match = re.match(r".*\.experts\.\d+(?=\.)", name)
    return match[0] if match else ""


def natural(name: str) -> tuple[Any, ...]:
    """Sorting key that puts layer 2 before layer 10, for names of some hundred characters."""
    # Every second part is a number; what isdigit() takes for one may be none, such as a superscript.
    return tuple(int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name)))
