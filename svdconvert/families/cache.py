"""Keys and values that attention keeps of a token. No torch."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config
from svdconvert.names import suffix

_KEPT = (".k_proj", ".v_proj")
_PARTS = ("key", "value")
# Projections to queries, keys and values that are not split.
_WITH_QUERIES = (".query_key_value", ".c_attn", ".Wqkv")


def cached_numbers(row: Architecture, config: Config) -> int:
    """Numbers that the cache of keys and values takes of each token, in all layers together.

    Layers with a sliding window are counted as the others: the cache of a text that is no longer than the window.
    States of recurrences do not grow with the text, and are not counted.

    Args:
        row: the family.
        config: config.json, checked.
    """
    count = 0
    for name, shape in row.parameters(config).items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        fused = row.fused.get(suffix(layer))
        if fused is not None:
            sections = fused.sections(config)
            count += sum(sections[part].outputs for part in _PARTS)
        elif layer.endswith((*_KEPT, *_WITH_QUERIES)):
            outputs, inputs = row.matrix_shape((shape[0], shape[1]))
            own = outputs if layer.endswith(_KEPT) else outputs - inputs  # there are as many queries as inputs
            count += 2 * inputs if row.copies_keys(config) else own
    return count
