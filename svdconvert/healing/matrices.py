"""The factored and the packed matrices of a checkpoint, and those of the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport
from svdconvert.families.fused import split_layers, split_tensors
from svdconvert.families.table import Architecture, dense_architecture, factored_architecture
from svdconvert.grids import scale_of
from svdconvert.layouts.table import layout_of, shared_layers, stored_names
from svdconvert.linalg.residual import relative_difference, relative_error
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.rounded import read_rounded
from svdconvert.storage.source import Source
from svdconvert.tensors import DTYPES, TensorInfo


def dense_matrices(source: Source, dense: Source) -> dict[str, TensorInfo]:
    """Module path of each factored layer -> the dense model's weight of it.

    Args:
        source: the factored checkpoint.
        dense: the dense model.

    Raises:
        InputError: the factored model was not made from it.
    """
    row = factored_architecture(source.config, source.where)
    if dense_architecture(dense.config, dense.where) is not row:
        raise InputError(f"{dense.where} is a {dense.config.get('model_type')} model, not the source of {source.where}")
    ranks, layout = source.config["svd_ranks"], layout_of(source.config)
    split = split_layers(row, ranks)
    full_names = row.full_names(dense.tensors, dense.config)
    found = {}
    for name, info in split_tensors(dense.tensors, row, dense.config, split.__contains__).items():
        module = (full_names.get(name) or row.full_name(name)).removeprefix(row.prefix).removesuffix(".weight")
        if module not in ranks or not name.endswith(".weight"):
            continue
        stored = [source.tensors[key] for key in stored_names(source.config, row.prefix, module)]
        if layout.outer_shape(stored) != row.matrix_shape(info.shape):
            raise InputError(
                f"{name} has another shape in {dense.where} than in {source.where}; it is not the model that this "
                "was made from"
            )
        found[module] = info
    missing = [module for module in ranks if module not in found]
    if missing or _rest(source, row) != _rest(dense, row):
        raise InputError(
            f"{dense.where} {f'has no {missing[0]}' if missing else 'has other embeddings or blocks'}, so it is not "
            f"the model that {source.where} was made from"
        )
    return found


def _rest(source: Source, row: Architecture) -> tuple[object, int]:
    """Shape of the embedding, and number of the blocks."""
    full = row.full_names(source.tensors, source.config)
    blocks = f"{row.prefix}{row.pieces.blocks}."
    embedding = next((source.tensors[name].shape for name, own in full.items() if own == row.embedding), None)
    numbers = {own.removeprefix(blocks).partition(".")[0] for own in full.values() if own.startswith(blocks)}
    return embedding, len(numbers)


@dataclass(frozen=True)
class HealedMatrices:
    """What is known of the matrices of a checkpoint with other values in what is trained.

    Attributes:
        products: module path -> of a product of low rank.
        rounded: module path -> of a dense matrix that is packed.
    """

    products: Mapping[str, MatrixReport]
    rounded: Mapping[str, RoundedReport]


def healed_matrices(source: Source, dense: Source, trained: Mapping[str, Tensor]) -> HealedMatrices:
    """How far the matrices of a checkpoint are from the dense model's.

    Args:
        source: the factored checkpoint.
        dense: the dense model.
        trained: tensor -> its values, of those that differ from the checkpoint's.
    """
    row, layout = factored_architecture(source.config, source.where), layout_of(source.config)
    shared, products, rounded = shared_layers(source.config), dict[str, MatrixReport](), dict[str, RoundedReport]()
    with WeightReader(source) as ours, WeightReader(dense) as theirs:

        def stored(name: str) -> Tensor:
            if name in source.packed:
                kept = read_rounded(source, name)
                return replace(kept, scales=trained.get(scale_of(name), kept.scales)).values(torch.float32)
            return trained[name] if name in trained else _whole(ours, source.tensors[name])

        for module, info in dense_matrices(source, dense).items():
            names = stored_names(source.config, row.prefix, module)
            up, down = layout.factors([stored(name) for name in names])
            weight = _whole(theirs, info)
            weight = weight.T if row.transposed else weight
            products[module] = MatrixReport(
                rank=int(source.config["svd_ranks"][module]),
                shape=(weight.shape[0], weight.shape[1]),
                relative_error=relative_error(weight, up, down),
                shared_with=shared.get(module),
                **_widths(source, names),
            )
        for module, (name, info) in _packed_whole(source, dense).items():
            weight = _whole(theirs, info)
            rounded[module] = RoundedReport(
                shape=(weight.shape[0], weight.shape[1]),
                relative_error=relative_difference(weight, stored(name)),
                **_widths(source, [name]),
            )
    return HealedMatrices(products, rounded)


def _packed_whole(source: Source, dense: Source) -> dict[str, tuple[str, TensorInfo]]:
    """Module path -> name of its weight, and the dense model's, of packed matrices that are no factors."""
    row, ranks = factored_architecture(source.config, source.where), source.config["svd_ranks"]
    split, full = split_layers(row, ranks), row.full_names(dense.tensors, dense.config)
    found = {}
    for name, info in split_tensors(dense.tensors, row, dense.config, split.__contains__).items():
        own = row.factored_name(full.get(name) or row.full_name(name))
        if own in source.packed:
            found[own.removeprefix(row.prefix).removesuffix(".weight")] = (own, info)
    return found


def _widths(source: Source, names: Sequence[str]) -> dict[str, Any]:
    """Bits and groups of the weights among some tensors; nothing where none is packed."""
    if not any(name in source.packed for name in names):
        return {}
    weights = [name for name in names if name.endswith(".weight")]
    grids = {name: source.packed[name].grid for name in weights if name in source.packed}
    plain = {name: 8 * DTYPES[source.tensors[name].dtype][0] for name in weights}
    return {
        "bits": [grids[name].bits if name in grids else plain[name] for name in weights],
        "groups": [grids[name].group if name in grids else 0 for name in weights],
    }


def _whole(reader: WeightReader, info: TensorInfo) -> Tensor:
    return reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
