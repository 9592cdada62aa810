"""Loading a model, dense or factored, for looking at it. Code that lies in the model's folder is never run."""

from __future__ import annotations

import copy
import importlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES, FACTORED, Architecture, dense_architecture, dense_shapes
from svdconvert.foreign import foreign_code
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.storage.documents import json_or_none, read_json
from svdconvert.storage.headers import read_header
from svdconvert.storage.other_models import refuse_other_model
from svdconvert.storage.pickled import pickled_header
from svdconvert.storage.source import LocalSource, Source, parse_index, weight_files

if TYPE_CHECKING:
    import torch


# How a model is computed is the user's choice for his machine; what a look needs is a way that runs on any. LLaMA's
# `pretraining_tp` has transformers 4 take a layer's weight apart, which is no weight where it is a product, and which
# no hook sees.
_WAYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "pretraining_tp")

# What holds the vocabulary of a tokenizer, of whatever class.
_VOCABULARY = re.compile(r"(tokenizer|tekken)\.json|.*vocab.*\.\w+|.*\.(model|tiktoken|codes|tokenizer)|dict\.txt")
# What else is read together with them; refused by name where it is no JSON, or JSON that would take a parser down.
_TOKENIZER_DOCUMENTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

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
    from transformers import AutoModelForCausalLM

    found = config or read_json(
        folder / "config.json", f"{folder} has no config.json, so it is not a model folder; give the one that holds it"
    )
    found = portable(found)
    options = {**dtype_option(dtype), "output_loading_info": True}
    row = FACTORED.get(str(found.get("model_type")))
    with foreign_code(f"{folder} cannot be loaded"), quiet_transformers(), _view(folder, found) as seen:
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
            with foreign_code(f"{folder} cannot be loaded"):
                wrong = _fill(model, source, dense)
    if wrong:
        raise InputError(f"{folder} cannot be loaded: {len(wrong)} tensors are missing or misshapen ({wrong[0]})")
    return model.to(device).eval()


def dtype_option(dtype: torch.dtype) -> dict[str, Any]:
    """The argument that gives a model the type of its weights; its name changed in transformers 4.56."""
    import transformers

    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    return {"dtype" if version >= (4, 56) else "torch_dtype": dtype}


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of config.json without the way in which the model is to be computed.

    Deep, because transformers 5 writes into the rotary settings that it is given, and what we write must not have them.
    """
    return copy.deepcopy({key: value for key, value in config.items() if key not in _WAYS})


def _fill(model: Any, source: Source, row: Architecture) -> list[str]:
    """Give a dense model the tensors that have the names of a wrapper in their files.

    Returns:
        The weights that it still lacks.
    """
    import torch

    from svdconvert.storage.reader import WeightReader

    # transformers 5 has another name for GPT-NeoX's head than its files.
    head = next(name for name in row.head if name in model.state_dict())
    reader, weights = WeightReader(source), {}
    for name, info in source.tensors.items():
        own = head if name == row.head[0] else row.full_name(name)
        weights[own] = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
    reader.close()
    missing, _ = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return [name for name in missing if name != head or not row.is_tied(source.config)]


@contextmanager
def _view(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that has the model as it will be, whatever is beside it yet: its config.json and links to its weights.

    transformers looks into the folder for more than weights: with no usable generation_config.json for config.json
    itself, whatever config it was given.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    index, files, pickled = weight_files(names, folder)
    if index:
        files = [index, *set(parse_index(read_json(folder / index, f"{folder / index} is missing"), index).values())]
    for name in files:
        if name != index:
            (pickled_header if pickled else read_header)(folder / name)
    with temporary_folder() as seen:
        for name in {*files, *({_GENERATION} if json_or_none(folder / _GENERATION) is not None else ())}:
            (seen / name).symlink_to((folder / name).resolve())
        (seen / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield seen


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the vocabulary of a tokenizer."""
    return any(_VOCABULARY.fullmatch(path.name) and path.is_file() for path in folder.iterdir())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        InputError: it has none; no other is used in its place.
    """
    from transformers import AutoConfig, AutoTokenizer

    # transformers 5 makes up an empty tokenizer where there is none.
    if not has_tokenizer(folder):
        raise InputError(f"{folder} has no usable tokenizer (tokenizer.json, tokenizer.model, vocab.json or the like)")
    for name in _TOKENIZER_DOCUMENTS:
        if (folder / name).exists():
            read_json(folder / name, "")
    file = folder / "config.json"
    row = FACTORED.get(str(read_json(file, "").get("model_type"))) if file.is_file() else None
    # Left to itself, transformers 5 reads config.json as one of no particular kind, which some rotary scalings break.
    options = {"config": AutoConfig.for_model(row.model_type)} if row else {}
    with foreign_code(f"{folder} has no usable tokenizer"), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def opening_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text of its own accord, as LLaMA's, Gemma's and OPT's do."""
    first = getattr(tokenizer, "bos_token_id", None)
    return int(first) if first is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [first] else None


def compute_dtype(config: Mapping[str, Any], device: str) -> torch.dtype:
    """Type to evaluate in: the stored one on a GPU; float32 on the CPU, where half types are slow or missing."""
    import torch

    named = config.get("torch_dtype") or config.get("dtype") or "float32"
    stored = getattr(torch, str(named), None)
    if not isinstance(stored, torch.dtype):
        raise InputError(f"config.json says torch_dtype {named!r}, but it must be a type of torch; correct it")
    return stored if device.startswith("cuda") else torch.float32


class quiet_transformers:
    """Context in which transformers neither draws progress bars nor prints load reports: we report what counts."""

    def __enter__(self) -> None:
        """Silence it."""
        from transformers.utils import logging

        self._verbosity, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        with warnings.catch_warnings():
            # Where HF_HUB_DISABLE_PROGRESS_BARS is set, huggingface_hub warns that it decides.
            warnings.simplefilter("ignore")
            logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        """Let it speak as before."""
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()
