"""The factored matrices of a checkpoint and those of the dense model that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.matrix_report import MatrixReport
from svdconvert.families.fused import split_layers, split_tensors
from svdconvert.families.table import Architecture, dense_architecture, factored_architecture
from svdconvert.layouts.table import layout_of, shared_layers, stored_names
from svdconvert.linalg.residual import relative_error
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo


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


def matrix_reports(source: Source, dense: Source, factors: Mapping[str, Tensor]) -> dict[str, MatrixReport]:
    """Module path of each factored layer -> what is known of it with other factors.

    Args:
        source: the factored checkpoint.
        dense: the dense model.
        factors: tensor -> its values, of those that differ from the checkpoint's.
    """
    row, layout = factored_architecture(source.config, source.where), layout_of(source.config)
    shared, reports = shared_layers(source.config), {}
    with WeightReader(source) as ours, WeightReader(dense) as theirs:
        for module, info in dense_matrices(source, dense).items():
            names = stored_names(source.config, row.prefix, module)
            stored = [factors[name] if name in factors else _whole(ours, source.tensors[name]) for name in names]
            up, down = layout.factors(stored)
            weight = _whole(theirs, info)
            weight = weight.T if row.transposed else weight
            reports[module] = MatrixReport(
                rank=int(source.config["svd_ranks"][module]),
                shape=(weight.shape[0], weight.shape[1]),
                relative_error=relative_error(weight, up, down),
                shared_with=shared.get(module),
            )
    return reports


def _whole(reader: WeightReader, info: TensorInfo) -> Tensor:
    return reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
