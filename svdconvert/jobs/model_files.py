"""What makes a folder of weight files a model: index, modeling file, side files, record, and config.json last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from svdconvert.families.table import Architecture
from svdconvert.families.tower import Tower
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.record import RECORD
from svdconvert.planning.steps import index_json
from svdconvert.storage.documents import json_bytes, read_bytes
from svdconvert.storage.packed_config import unpacked_config
from svdconvert.storage.side_files import code_classes
from svdconvert.storage.source import SAFE_INDEX, Source
from svdconvert.storage.tokenizer_class import SETTINGS, whole_settings
from svdconvert.tensors import TensorInfo


def modeling_source(row: Architecture | Tower) -> bytes:
    """The modeling file of an architecture, as it is copied into checkpoints."""
    # By the package's folder: in a checkout that is another one than this file's.
    return Path(import_module("svdconvert.modeling").__path__[0], f"{row.modeling}.py").read_bytes()


def code_files(source: Source, row: Architecture) -> dict[str, bytes]:
    """The modeling file that a factored result needs, by its name: the whole model's, where that sees."""
    owner = row if source.whole is None else source.whole.tower
    return {f"{owner.modeling}.py": modeling_source(owner)}


def written_config(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a result, from that of its language model, which it is itself unless the source sees."""
    return dict(config) if source.whole is None else source.whole.tower.whole_config(source.whole.config, config)


def factored_config(
    source: Mapping[str, Any],
    row: Architecture,
    ranks: Mapping[str, int],
    dtype: str,
    layout: str,
    shared: Mapping[str, str],
) -> dict[str, Any]:
    """config.json of the factored model: the source's fields, and what makes it loadable.

    Args:
        source: the dense model's config.
        row: its architecture.
        ranks: module path -> rank.
        dtype: ``keep``, or the torch type of the new weights.
        layout: how the products are stored.
        shared: module path -> that of the layer whose input-side factor it uses.
    """
    config = {key: value for key, value in source.items() if key not in ("_name_or_path", "dtype")}
    config |= row.config_overrides(source) | {"tie_word_embeddings": row.is_tied(source)}
    config |= {
        "architectures": [row.causal_class],
        "auto_map": code_classes(source) | row.auto_map,
        "model_type": row.svd_model_type,
        "svd_ranks": dict(ranks),
        "svd_layout": layout,
        "svd_shared": dict(shared),
    }
    # transformers before 4.56 knows torch_dtype only; later ones read either.
    stored = source.get("torch_dtype") or source.get("dtype") if dtype == "keep" else dtype
    if stored:
        config["torch_dtype"] = stored
    return config


def dense_config(factored: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """config.json of the stock model that a factored one multiplies out to."""
    config = {
        key: value
        for key, value in unpacked_config(factored).items()
        if key not in ("auto_map", "svd_ranks", "svd_layout", "svd_shared", "_name_or_path")
    }
    config |= row.config_overrides(factored) | {"tie_word_embeddings": row.is_tied(factored)}
    if kept := code_classes(factored):
        config["auto_map"] = kept
    return config | {"architectures": [row.dense_class], "model_type": row.model_type}


def write_model_files(
    output: OutputFolder,
    source: Source,
    shards: Mapping[str, Sequence[TensorInfo]],
    *,
    extra: Mapping[str, bytes],
    card: str,
    record: Mapping[str, Any],
) -> None:
    """Write everything but the weights and config.json."""
    index = index_json(shards)
    if index is not None:
        output.write_file(SAFE_INDEX, json_bytes(index))
    for name in source.side_files:
        output.write_file(name, _side_file(source, name))
    for name, data in extra.items():
        output.write_file(name, data)
    output.write_file("README.md", card.encode())
    output.write_file(RECORD, json_bytes(record))


def _side_file(source: Source, name: str) -> bytes:
    """A file beside the weights as it is, but for the class of a tokenizer that would not be read as the source's."""
    data = read_bytes(source.path(name), f"{name} of {source.name} is missing")
    if name != SETTINGS:
        return data
    changed = whole_settings(lambda file: source.path(file) if file in source.side_files else None)
    return data if changed is None else json_bytes(changed)


def write_config(output: OutputFolder, config: Mapping[str, Any]) -> None:
    """The last file: from here on the folder is a model."""
    output.write_file("config.json", json_bytes(dict(sorted(config.items()))))
    output.finished = True


def digest(data: bytes) -> str:
    """Short identity of a file's content."""
    return hashlib.sha256(data).hexdigest()[:16]
