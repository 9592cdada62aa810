"""Loading a model, dense or factored, to evaluate it. Code in the model's folder is never run."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.errors import InputError
from svdconvert.families.table import (
    ARCHITECTURES,
    FACTORED,
    Architecture,
    dense_architecture,
    dense_shapes,
    factored_architecture,
)
from svdconvert.families.towers import tower_of
from svdconvert.foreign import CORRECT, FETCH, foreign_code, quiet_transformers
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.storage.documents import json_or_none, read_json
from svdconvert.storage.gguf_source import source_of_view
from svdconvert.storage.headers import read_header
from svdconvert.storage.other_models import refuse_other_model
from svdconvert.storage.packed_config import is_packed, unpacked_config
from svdconvert.storage.pickled import pickled_header
from svdconvert.storage.source import LocalSource, Source, parse_index, raw_config, weight_files

if TYPE_CHECKING:
    import torch


# How a model is computed is chosen for the machine that it will run on; here it has to run on any. LLaMA's
# `pretraining_tp` makes transformers 4 slice the weights of layers, which fails where the weight is a product, and
# which no hook sees.
_WAYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "pretraining_tp")


_GENERATION = "generation_config.json"


def factored_classes(row: Architecture) -> tuple[Any, Any]:
    """``(config class, causal model class)`` of a factored architecture, from this package's own modeling file."""
    module = importlib.import_module(f"svdconvert.modeling.{row.modeling}")
    return getattr(module, row.config_class), getattr(module, row.causal_class)


def load_model(
    folder: Path, device: str, dtype: torch.dtype, config: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """Load a causal language model in evaluation mode.

    Args:
        folder: a dense or a factored checkpoint.
        device: where to put it.
        dtype: type of its weights.
        config: config.json's content, where the file is not written yet.

    Raises:
        InputError: the folder is no model, is of an unknown kind, or its weights and config do not fit.
    """
    viewed = source_of_view(folder)
    if viewed is not None:
        return load_source(viewed, device, dtype)
    from transformers import AutoModelForCausalLM

    raw = dict(config) if config is not None else raw_config(folder)
    if tower_of(raw) is not None:  # its language model
        source = LocalSource(folder, config=raw)
        return (load_packed if "svd_ranks" in source.config else load_source)(source, device, dtype)
    found = portable(raw)
    if is_packed(found) and "svd_ranks" in found:
        return load_packed(LocalSource(folder, config=found), device, dtype)
    options = {**dtype_option(dtype), "output_loading_info": True}
    known = ARCHITECTURES.get(str(found.get("model_type")))
    if known is not None and known.experts is not None:  # the experts as modules, as everywhere
        return load_source(LocalSource(folder, config=found), device, dtype)
    row = FACTORED.get(str(found.get("model_type")))
    with foreign_code(f"{folder} cannot be loaded", FETCH), quiet_transformers(), _view(folder, found) as seen:
        if row is None:
            model, info = AutoModelForCausalLM.from_pretrained(seen, trust_remote_code=False, **options)
        else:
            config_class, model_class = factored_classes(row)
            model, info = model_class.from_pretrained(seen, config=config_class(**found), **options)
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong and config is None and found.get("model_type") in ARCHITECTURES:
        source = LocalSource(folder)
        dense = dense_architecture(found, source.where)
        full, expected = dense.full_names(source.tensors, found), dense_shapes(dense, found, source.where)
        refuse_other_model(source.tensors, full, expected, dense, source)
        if source.stored:
            with foreign_code(f"{folder} cannot be loaded", FETCH):
                wrong = _fill(model, source, dense)
    if wrong:
        raise InputError(
            f"{folder} cannot be loaded: {len(wrong)} tensors are missing or misshapen ({wrong[0]}); {FETCH}"
        )
    return model.to(device).eval()


def load_source(source: Source, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A dense model in evaluation mode, in memory once, whatever type its weights are stored in.

    Args:
        source: the checkpoint; transformers need have no file of its weights.
        device: where to put it.
        dtype: type of its weights.

    Raises:
        InputError: it is of an unknown kind, or its weights and config do not fit.
    """
    from accelerate import init_empty_weights

    row = dense_architecture(source.config, source.where)
    full, expected = row.full_names(source.tensors, source.config), dense_shapes(row, source.config, source.where)
    refuse_other_model(source.tensors, full, expected, row, source)
    strange = [
        name
        for name in source.tensors
        if full[name] not in expected and full[name] not in row.head and not row.is_dropped(name)
    ]
    if strange:
        raise InputError(f"{source.where} has the tensor {strange[0]}, which {row.dense_class} does not know")
    problem = f"config.json of {source.where} cannot be used"
    with foreign_code(problem, CORRECT), quiet_transformers(), init_empty_weights(include_buffers=False):
        model = stock_model(row, portable(source.config))
    _read_into(model, source, row, row.head[0], device, dtype)
    found: torch.nn.Module = model.to(device).eval()
    return found


def load_packed(source: Source, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A factored model whose weights are read one by one, packed ones multiplied out, in evaluation mode.

    compressed-tensors need not be installed: its own arithmetic in float32 gives the same numbers.

    Args:
        source: the checkpoint.
        device: where to put it.
        dtype: type of its weights.

    Raises:
        InputError: its weights and config do not fit.
    """
    from accelerate import init_empty_weights

    row = factored_architecture(source.config, source.where)
    config_class, model_class = factored_classes(row)
    problem = f"config.json of {source.where} cannot be used"
    with foreign_code(problem, CORRECT), quiet_transformers(), init_empty_weights(include_buffers=False):
        model = model_class(config_class(**portable(unpacked_config(source.config))))
    known = {*model.state_dict(), *row.head}
    for name in source.tensors:
        if row.full_name(name) not in known:
            raise InputError(f"{source.where} has the tensor {name}, which its config.json does not know")
    _read_into(model, source, row, row.head[1], device, dtype)
    code = importlib.import_module(model_class.__module__)
    with foreign_code(f"{source.where} cannot be loaded", FETCH):
        code._check_positions(model)
    code._make_adaptable(model)
    found: torch.nn.Module = model.to(device).eval()
    return found


def _read_into(model: Any, source: Source, row: Architecture, head: str, device: str, dtype: torch.dtype) -> None:
    """Give a model its weights; buffers that are not in the files it has already.

    Args:
        model: without weights, its buffers real.
        source: the checkpoint.
        row: its architecture.
        head: name that the head's weight has in the files.
        device, dtype: of the weights.
    """
    import torch

    from svdconvert.models.piece_weights import PieceWeights
    from svdconvert.storage.reader import WeightReader

    model.tie_weights()  # leaving weights out has made the head one of its own
    full = row.full_names(source.tensors, source.config)
    named = {full[name]: info for name, info in source.tensors.items()}
    weights = PieceWeights(source, named, device=torch.device(device), dtype=dtype, stored_as={})
    with WeightReader(source) as reader:
        for key, empty in list(model.named_parameters()):  # a tied head is not among them
            path, _, last = key.rpartition(".")
            stored = head if key in row.head else key  # transformers 5 has another name for GPT-NeoX's head
            whole = torch.nn.Parameter(weights.read(reader, stored, empty), requires_grad=False)
            setattr(model.get_submodule(path), last, whole)
        for key, buffer in model.named_buffers():
            if key in named:
                buffer.copy_(weights.read(reader, key, buffer))
    model.tie_weights()


def stock_model(row: Architecture, config: Mapping[str, Any]) -> Any:
    """The dense causal model of a config, with whatever weights it is created with.

    Args:
        row: its architecture.
        config: config.json's content, see :func:`portable`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # spelled as in our checkpoints: some old spellings are understood by one version only, or by none
    settings = {key: value for key, value in config.items() if key != "model_type"}
    settings |= row.config_overrides(config)
    made = AutoConfig.for_model(config["model_type"], **settings)
    # Otherwise buffers would be computed in the config's half type.
    model = AutoModelForCausalLM.from_config(made, trust_remote_code=False, **dtype_option(torch.float32))
    if row.experts is not None:  # as modules, which have matrices and are called one by one
        importlib.import_module(f"svdconvert.modeling.{row.modeling}")._separate_experts(model.base_model)
    return model


def dtype_option(dtype: torch.dtype) -> dict[str, Any]:
    """The argument that gives a model the type of its weights; its name changed in transformers 4.56."""
    import transformers

    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json without the settings of how the model is computed.

    A deep copy, because transformers 5 writes into the rotary settings it receives, and its changes must not be saved.
    """
    return {key: _read(value) for key, value in config.items() if key not in _WAYS}


def _read(value: Any) -> Any:
    """A copy of a field's value, with the numbers that JSON has no form for, which transformers 5 writes as objects."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _read(entry) for key, entry in value.items()}
    return [_read(entry) for entry in value] if isinstance(value, list) else copy.deepcopy(value)


def _fill(model: Any, source: Source, row: Architecture) -> list[str]:
    """Load the tensors whose files have a wrapper's names for them.

    Returns:
        The weights that are still missing.
    """
    import torch

    from svdconvert.storage.reader import WeightReader

    # transformers 5 has another name for GPT-NeoX's head than its files.
    head = next(name for name in row.head if name in model.state_dict())
    weights = {}
    with WeightReader(source) as reader:
        for name, info in source.tensors.items():
            own = head if name == row.head[0] else row.full_name(name)
            weights[own] = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
    missing, _ = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return [name for name in missing if name != head or not row.is_tied(source.config)]


@contextmanager
def _view(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with nothing but the model as it will be: its config.json, and links to its weights.

    transformers looks for more than weights in a folder: without a usable generation_config.json it reads config.json,
    even if it was given a config.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    index, files, pickled = weight_files(names, folder)
    places = parse_index(read_json(folder / index, f"{folder / index} is missing"), index) if index else {}
    files = files or sorted(set(places.values()))
    for name in files:
        (pickled_header if pickled else read_header)(folder / name)
    with temporary_folder() as seen:
        if index:  # transformers insists on metadata, of which it needs nothing
            made = json.dumps({"metadata": {}, "weight_map": places})
            (seen / index).write_text(made, encoding="utf-8")
        for name in {*files, *({_GENERATION} if json_or_none(folder / _GENERATION) is not None else ())}:
            (seen / name).symlink_to((folder / name).resolve())
        (seen / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield seen


def compute_dtype(config: Mapping[str, Any], device: str) -> torch.dtype:
    """Type to evaluate in: the stored one on a GPU; float32 on the CPU, where half types are slow or missing."""
    import torch

    named = config.get("torch_dtype") or config.get("dtype") or "float32"
    stored = getattr(torch, str(named), None)
    if not isinstance(stored, torch.dtype):
        raise InputError(f"config.json says torch_dtype {named!r}, but it must be a type of torch; correct it")
    return stored if device.startswith("cuda") else torch.float32
