"""The layouts by name, and what a factored checkpoint's config says about its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svdconvert.errors import InputError
from svdconvert.layouts.balanced import Balanced
from svdconvert.layouts.pivoted import Pivoted
from svdconvert.layouts.row import Layout
from svdconvert.sentences import asked

LAYOUTS: Mapping[str, Layout] = {row.name: row for row in (Balanced(), Pivoted())}
DEFAULT_LAYOUT = LAYOUTS["balanced"]


def layout_named(name: str) -> Layout:
    """Look a layout up.

    Raises:
        InputError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise InputError(f"{asked('layout', name)} is unknown; choose {' or '.join(LAYOUTS)}")
    return LAYOUTS[name]


def stored_names(config: Mapping[str, Any], prefix: str, module: str) -> tuple[str, ...]:
    """Names of the tensors that a factored layer is made of, as :meth:`Layout.names`.

    A layer that shares has the first one where its owner has it.

    Args:
        config: of the factored checkpoint.
        prefix: of the base model in tensor names.
        module: path of the layer in the base model.
    """
    layout = layout_of(config)
    names = layout.names(f"{prefix}{module}.weight")
    owner = shared_layers(config).get(module)
    return names if owner is None else (layout.names(f"{prefix}{owner}.weight")[0], *names[1:])


def shared_layers(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Layer -> the one whose input-side factor it uses, of a factored checkpoint."""
    found = config.get("svd_shared") or {}
    # a copy for each of some thousand layers would take long; dict() refuses what is no mapping
    return found if isinstance(found, Mapping) else dict(found)


def layout_of(config: Mapping[str, object]) -> Layout:
    """The layout of a factored checkpoint."""
    return layout_named(str(config.get("svd_layout", DEFAULT_LAYOUT.name)))
