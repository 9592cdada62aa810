"""The linear layers of a model that may be factored, and which of them share a factor. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from svdconvert.errors import InputError
from svdconvert.families.fused import fused_layer, split_tensors
from svdconvert.families.row import Architecture
from svdconvert.families.table import dense_architecture
from svdconvert.names import kind, layer_number, natural, suffix
from svdconvert.planning.ranks import Target
from svdconvert.sentences import asked
from svdconvert.settings.scope import patterns_of
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo


def find_targets(source: Source, patterns: str | Sequence[str], *, split_fused: bool = False) -> list[Target]:
    """The linear layers of a dense model that may be factored, see :func:`choose_targets`.

    Args:
        source: the dense model.
        patterns: which of them, or a single one; empty chooses all.
        split_fused: whether fused projections are in parts.

    Raises:
        InputError: a pattern matches none, or there is nothing to split.
    """
    row = dense_architecture(source.config, source.where)
    tensors: Mapping[str, TensorInfo] = source.tensors
    if split_fused:
        tensors, row = in_parts(tensors, row, source)
    return choose_targets(tensors, row, patterns_of(patterns))


def in_parts(
    tensors: Mapping[str, TensorInfo], row: Architecture, source: Source
) -> tuple[dict[str, TensorInfo], Architecture]:
    """Tensors and row with all fused projections in parts."""
    if not row.fused:
        raise InputError(
            f"{asked('split_fused', True)} has nothing to split in {source.where}: a {row.model_type} model keeps "
            "queries, keys and values in separate matrices; leave it out"
        )
    return split_tensors(tensors, row, source.config, lambda layer: True), row.split()


def choose_targets(tensors: Mapping[str, TensorInfo], row: Architecture, patterns: Sequence[str]) -> list[Target]:
    """The linear layers that may be factored, by layer and then in the architecture's order.

    Raises:
        InputError: a pattern matches none of them.
    """
    layers = []
    for name, info in tensors.items():
        module = row.full_name(name).removeprefix(row.prefix).removesuffix(".weight")
        if name.endswith(".weight") and kind(module) in row.targets:
            fused = fused_layer(row, module)
            shape = row.matrix_shape(info.shape)
            layers.append(Target(module, name, shape, transposed=row.transposed, fused=fused))
    places = {name: place for place, name in enumerate(row.targets)}
    layers.sort(key=lambda one: (layer_number(one.module), places[kind(one.module)], natural(one.module)))
    for pattern in patterns:
        if not any(target.parts[0].is_named(pattern) for target in layers):
            raise InputError(
                f"{asked('targets', pattern)} matches no linear layer of the model; layers have names like "
                f"{', '.join(target.module for target in layers[: len(row.targets)])}"
            )
    return [t for t in layers if not patterns or any(t.parts[0].is_named(pattern) for pattern in patterns)]


def share(targets: Sequence[Target], layers: int, tensors: Mapping[str, TensorInfo]) -> list[Target]:
    """Put targets of one kind in consecutive layers together, so many at a time; what is left makes a smaller group.

    Args:
        targets: single ones, by layer.
        layers: how many; 1 leaves everything as it is.
        tensors: of the source.
    """
    if layers == 1:
        return list(targets)
    groups: list[list[Target]] = []
    growing: dict[tuple[str, int, str], list[Target]] = {}
    for target in targets:
        alike = (suffix(target.module), target.shape[1], tensors[target.weight].dtype)
        group = growing.get(alike, [])
        if group and len(group) < layers and layer_number(target.module) == layer_number(group[-1].module) + 1:
            group.append(target)
        else:
            growing[alike] = [target]
            groups.append(growing[alike])
    return [_group(group) for group in groups]


def share_experts(targets: Sequence[Target], tensors: Mapping[str, TensorInfo], row: Architecture) -> list[Target]:
    """Put targets of one kind together that read the same hidden states: those of all experts of a layer.

    Args:
        targets: single ones, by layer.
        tensors: of the source.
        row: its architecture.

    Raises:
        InputError: the family has no experts, or of no layer are such matrices of two experts to be factored.
    """
    if row.experts is None:
        raise InputError(
            f"{asked('share_experts', True)} has nothing to share: {row.model_type} models have no experts; leave it "
            "out"
        )
    inward = row.experts.targets[:-1]
    groups: dict[tuple[str, ...], list[Target]] = {}
    for target in targets:
        own = kind(target.module)
        alike = (own, str(layer_number(target.module)), tensors[target.weight].dtype)
        groups.setdefault(alike if own in inward else (target.module,), []).append(target)
    if len(groups) == len(targets):
        raise InputError(
            f"{asked('share_experts', True)} has nothing to share: no layer has two experts whose matrices that "
            "read hidden states are factored; leave it out, or choose other targets"
        )
    return [_group(group) for group in groups.values()]


def _group(members: Sequence[Target]) -> Target:
    """Targets that share their input-side factor, as one."""
    first, *others = members
    return replace(
        first,
        shape=(first.shape[0] + sum(other.shape[0] for other in others), first.shape[1]),
        followers=tuple(other.parts[0] for other in others),
    )


def target_tensors(source: Source, targets: Iterable[Target]) -> dict[str, TensorInfo]:
    """A dense model's tensors as targets name them."""
    split = {part.fused for target in targets for part in target.parts}
    row = dense_architecture(source.config, source.where)
    return split_tensors(source.tensors, row, source.config, split.__contains__)
