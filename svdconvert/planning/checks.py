"""Checks of a checkpoint's headers against its config."""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture, dense_shapes
from svdconvert.names import layer_number
from svdconvert.sentences import asked
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.other_models import quantised_part, refuse_other_model
from svdconvert.storage.source import Source
from svdconvert.tensors import DTYPES, FLOATS, TensorInfo
from svdconvert.words import listing


def check_tensors(tensors: Mapping[str, TensorInfo], row: Architecture, source: Source) -> None:
    """Compare the headers with what a model of this config must have.

    Raises:
        InputError: the checkpoint is quantised, or a tensor is missing, misshapen or unknown to the architecture.
    """
    check_layers(tensors, source)
    expected = dense_shapes(row, source.config, source.where)
    full = row.full_names(tensors, source.config)
    present = {full[name]: info for name, info in tensors.items()}
    for name, info in tensors.items():
        by = quantised_part(name)
        if by is not None or (full[name] in expected and info.dtype not in FLOATS):
            raise InputError(
                f"tensor {name} of {source.where} ({DTYPES[info.dtype][1]}) belongs to a quantised checkpoint"
                f"{by or ''}; convert the unquantised model and quantise the result"
            )
    refuse_other_model(tensors, full, expected, row, source)
    missing = [name for name in expected if name not in present]
    if missing:
        raise InputError(f"{source.where} lacks {listing(missing)}; the checkpoint is incomplete, fetch it again")
    if len(present) < len(tensors):
        twice = next(name for name in tensors if row.prefix + name in tensors)
        raise InputError(f"{source.where} has both {twice} and {row.prefix}{twice}; remove one of them")
    for name, info in tensors.items():
        shape = expected.get(full[name])
        if shape is None:
            raise InputError(
                f"{source.where} has the tensor {name} ({info.file}), which {row.dense_class} does not know; "
                "remove it from the checkpoint or correct config.json"
            )
        if info.shape != shape:
            raise InputError(
                f"tensor {name} of {source.where} has shape {list(info.shape)}, but according to config.json it must "
                f"be {list(shape)}; config and weights are not of one model"
            )


def check_packable(source: Source, row: Architecture, request: Conversion) -> None:
    """Refuse weights of few bits of a model that keeps its matrices transposed.

    Raises:
        InputError: they are asked for.
    """
    if not (request.size.rounds and row.transposed):
        return
    words = asked(*request.size.rounded_by)
    instead = f"use {asked('keep')} or {asked('params')}" + ("" if request.size.in_bytes else " alone")
    raise InputError(
        f"{words} cannot be met for {source.where}: {row.model_type} keeps its matrices transposed, for which there "
        f"are no packed weights; {instead}"
    )


def check_layers(tensors: Mapping[str, TensorInfo], source: Source) -> None:
    """Compare the number of blocks, before anything is allocated for as many as config.json claims.

    Raises:
        InputError: the numbers differ.
    """
    names = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")
    said = next((number for name in names if (number := source.config.get(name))), None)
    there = 1 + max((layer_number(name) for name in tensors), default=-1)
    if said and there and said != there:
        raise InputError(
            f"config.json of {source.where} says {said} layers, but there are weights of {there}; "
            "the checkpoint is incomplete, or config and weights are not of one model"
        )
