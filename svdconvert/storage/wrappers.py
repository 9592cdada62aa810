"""Tensors under a wrapper's names, because the wrapper's state_dict was saved instead of the model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from svdconvert.families.table import ARCHITECTURES, FACTORED, Architecture
from svdconvert.layouts.table import stored_names
from svdconvert.tensors import TensorInfo

# Part of a name, and the wrapper that put it there.
_WRAPPERS: Mapping[str, str] = {
    "module.": "DataParallel, DDP or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
    "model.language_model.": "a model that sees or hears",
    "language_model.": "a model that sees or hears",
}
_FIRST = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")


def unwrap(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, str], str | None]:
    """Remove wrappers' parts from tensor names, where that gives the names that the model's class expects.

    Args:
        tensors: of a checkpoint, by name.
        config: its config.json.

    Returns:
        ``(tensors, stored, note)``: the tensors by their own names; own name -> name in the file, where they differ;
        and a note about it, or None.
    """
    fits = _fits(config)
    if fits is None:
        return dict(tensors), {}, None
    row, whole = fits
    names = {name: unwrapped(name, row) for name in tensors}
    renamed = {own: replace(tensors[name], name=own) for name, own in names.items()}
    if (
        len(renamed) < len(tensors)
        or renamed.keys() == tensors.keys()
        or whole(set(tensors))
        or not whole(set(renamed))
    ):
        return dict(tensors), {}, None
    parts = list(wrapped_by(tensors))
    note = f"the names of tensors are read without {' and '.join(f'`{part}`' for part in parts)}, which a wrapper adds"
    return renamed, {own: name for name, own in names.items() if own != name}, note


def wrapped_by(names: Mapping[str, Any]) -> dict[str, str]:
    """Parts of names that come from wrappers, and those wrappers."""
    return {
        part: who
        for part, who in _WRAPPERS.items()
        if any(name.startswith(part) or (part in _ANYWHERE and f".{part}" in name) for name in names)
    }


def unwrapped(name: str, row: Architecture) -> str:
    """A tensor's name without the parts that come from wrappers.

    >>> from svdconvert.families.table import GPT_NEOX
    >>> unwrapped("module._orig_mod.gpt_neox.layers.0.attention.dense.base_layer.weight", GPT_NEOX)
    'gpt_neox.layers.0.attention.dense.weight'
    """
    while first := next((part for part in _FIRST if name.startswith(part)), None):
        name = name.removeprefix(first)
    for part in _ANYWHERE:
        name = name.replace(f".{part}", ".")
    if name.startswith("model.language_model."):
        return row.prefix + name.removeprefix("model.language_model.")
    return name.removeprefix("language_model.")


def _fits(config: Mapping[str, Any]) -> tuple[Architecture, Callable[[set[str]], bool]] | None:
    """The architecture, and whether all names belong to a checkpoint of it; None if that cannot be known."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind in FACTORED and isinstance(config.get("svd_ranks"), dict):
        factored = FACTORED[kind]
        try:
            needed = {
                name for module in config["svd_ranks"] for name in stored_names(config, factored.prefix, str(module))
            }
        except (KeyError, TypeError, ValueError):
            return None
        return factored, needed.issubset
    if kind not in ARCHITECTURES:
        return None
    row = ARCHITECTURES[kind]
    try:
        expected = set(row.parameters(config))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # reported by the code that needs the shapes

    def whole(names: set[str]) -> bool:
        copies = set(row.head) if row.is_tied(config) else set()
        full = set(row.full_names((name for name in names if not row.is_dropped(name)), config).values())
        return full - copies == expected - copies

    return row, whole
