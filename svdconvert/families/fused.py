"""Fused projections in parts: queries, keys and values that are stored in one matrix, as a matrix each. No torch.

Everything else treats the parts as separate linear layers: targets with a rank, a metric and a share of the budget of
their own. Their tensors name byte ranges of the stored one, so nothing is copied or rewritten before it is read.
docs/fused.md says where splitting helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from svdconvert.families.row import Architecture, Config, Section
from svdconvert.names import suffix
from svdconvert.tensors import DTYPES, Cut, TensorInfo


def fused_layer(row: Architecture, module: str) -> str | None:
    """Path of the fused projection that a module is a part of; None if it is not a part of one.

    >>> from svdconvert.families.table import GPT_NEOX
    >>> fused_layer(GPT_NEOX, "layers.0.attention.query_key_value.key")
    'layers.0.attention.query_key_value'
    """
    layer, _, name = module.rpartition(".")
    fused = row.fused.get(suffix(layer))
    return layer if fused is not None and name in fused.names else None


def split_layers(row: Architecture, modules: Iterable[str]) -> set[str]:
    """The fused projections that some modules are parts of."""
    return {layer for module in modules if (layer := fused_layer(row, module)) is not None}


def section_of(row: Architecture, config: Config, module: str) -> Section | None:
    """Where the outputs of a part are among its projection's; None for a module that is not a part."""
    layer = fused_layer(row, module)
    return None if layer is None else row.fused[suffix(layer)].sections(config)[module.rpartition(".")[2]]


def split_tensors(
    tensors: Mapping[str, TensorInfo], row: Architecture, config: Config, chosen: Callable[[str], bool]
) -> dict[str, TensorInfo]:
    """A dense model's tensors, with those of fused projections replaced by those of their parts.

    Args:
        tensors: of the checkpoint, by name.
        row: its architecture.
        config: its config.json.
        chosen: whether a fused projection is to be split, by its path.
    """
    found = {}
    for name, info in tensors.items():
        layer, _, kind = row.full_name(name).removeprefix(row.prefix).rpartition(".")
        fused = row.fused.get(suffix(layer))
        if fused is None or not chosen(layer):
            found[name] = info
            continue
        for part, section in fused.sections(config).items():
            own = f"{name.removesuffix(kind)}{part}.{kind}"
            found[own] = _cut(info, own, section, transposed=row.transposed)
    return found


def _cut(info: TensorInfo, name: str, section: Section, *, transposed: bool) -> TensorInfo:
    """A section of a stored weight, [out, in] or transposed, or of a bias."""
    axis = len(info.shape) - 1 if transposed else 0
    shape = (*info.shape[:axis], section.outputs, *info.shape[axis + 1 :])
    # bytes from one output to the next
    unit = DTYPES[info.dtype][0] * (1 if axis else info.size // info.shape[0])
    stretch = info.shape[axis] // section.stretches
    cut = Cut(info.name, section.start * unit, section.count * unit, stretch * unit)
    return replace(info, name=name, shape=shape, cut=cut)
