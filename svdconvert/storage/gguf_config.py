"""config.json of a GGUF file, from its metadata.

The same fields as transformers makes of it, and those that transformers leaves to its defaults although the file has
them: the size of heads, windows, soft caps, rotary bases and scalings. What cannot be said in a config.json of the
family is refused, because a model without it would compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.fields import short
from svdconvert.storage.gguf_header import Counted, GgufHeader
from svdconvert.storage.gguf_rows import GGUF_ARCHITECTURES, GgufArchitecture
from svdconvert.tensors import CODES, DTYPES
from svdconvert.words import listing

# Settings that llama.cpp and transformers have defaults for; all others of a row must be there.
_OPTIONAL = (
    "vocab_size",
    "attention.head_count_kv",
    "rope.freq_base",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.sliding_window",
    "rope.freq_base_swa",
    "rope.scaling.original_context_length",
)
# Settings that need not be whole numbers.
_REAL = (
    "rope.freq_base",
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base_swa",
    "rope.scaling.factor",
)
# Settings of models that are computed in another way, and the values at which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "tensor_data_layout": ("Meta AI original pth",),
}
_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
# LLaMA 3.1's scaling of its rotation, which all of its files share but for the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_FREQS = "rope_freqs.weight"
# Phi-3's, for inputs beyond and within the context that it was trained with first.
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"

_ADVICE = "give the checkpoint that it was made from"


def architecture_of(header: GgufHeader, where: object) -> GgufArchitecture:
    """The row of a file's architecture.

    Raises:
        InputError: it is none of the table.
    """
    name = header.metadata.get("general.architecture")
    row = GGUF_ARCHITECTURES.get(name) if isinstance(name, str) else None
    if row is None or row.model_type not in ARCHITECTURES:
        known = sorted(row.name for row in GGUF_ARCHITECTURES.values() if row.model_type in ARCHITECTURES)
        raise InputError(
            f"{where} is a GGUF file of the architecture {short(name)}, which cannot be read; {_ADVICE}, or a file of "
            f"one of {', '.join(known)}"
        )
    return row


def config_of(
    header: GgufHeader, row: GgufArchitecture, where: object, tables: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """What config.json would say.

    Args:
        header: of the file, or of the first of its parts with the tensors of all.
        row: its architecture.
        where: the file, for messages.
        tables: tables of rotary factors among its tensors, by name.

    Raises:
        InputError: a setting is missing, or is one that config.json cannot say.
    """
    settings = _Settings(header.metadata, row.name, where)
    dense = ARCHITECTURES[row.model_type]
    config: dict[str, Any] = {"architectures": [dense.dense_class], "model_type": row.model_type}
    for key, name in row.fields.items():
        value = settings.take(key, needed=key not in _OPTIONAL)
        if value is not None:
            config[name] = value
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None:
        config.setdefault("vocab_size", embedding.shape[0])
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if "attention.head_count_kv" in row.fields:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if "rope.freq_base" in row.fields:
        config.setdefault("rope_theta", 10000.0)
        config |= _heads(
            settings,
            config,
            has_field=row.name not in ("qwen2", "phi3", "starcoder2"),
            partly="partial_rotary_factor" if row.name == "phi3" else None,
        )
        if scaling := settings.take_scaling():
            config["rope_scaling"] = scaling
    config |= _particular(row, header, config)
    if ROPE_FREQS in tables:
        config["rope_scaling"] = _llama3(tables[ROPE_FREQS], config, where)
    if row.name == "phi3" and ROPE_LONG in tables and ROPE_SHORT in tables:
        config["rope_scaling"] = _longrope(settings, tables, config)
    settings.finish()
    for key, name in _TOKENS.items():
        token = header.metadata.get(f"tokenizer.ggml.{key}")
        config[name] = token if type(token) is int else None
    return config | {"torch_dtype": _main_type(header)}


class _Settings:
    """The settings of an architecture, each of which must be asked for."""

    def __init__(self, metadata: Mapping[str, Any], name: str, where: object) -> None:
        beginning = f"{name}."
        self._left = {
            key.removeprefix(beginning): value for key, value in metadata.items() if key.startswith(beginning)
        }
        self._name, self._where = name, where

    def take(self, key: str, *, needed: bool = False) -> Any:
        """A number; None where the file does not say it."""
        if key not in self._left:
            if needed:
                raise InputError(f"{self._where} lacks {self._name}.{key}, so the model is unknown; {_ADVICE}")
            return None
        value = self._left.pop(key)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one number for each layer
        real = key in _REAL and type(value) is float and math.isfinite(value)
        if not (real or type(value) is int) or not 0 <= value < 2**63:
            raise self._wrong(key, value, "not one number for all layers")
        return value

    def take_scaling(self) -> dict[str, Any] | None:
        """The scaling of the rotation; None where there is none, and left for :meth:`finish` if it is another one."""
        if self._left.get("rope.scaling.type", "linear") not in ("none", "linear"):
            return None
        kind, factor = self._left.pop("rope.scaling.type", "none"), self.take("rope.scaling.factor") or 1.0
        return {"rope_type": "linear", "factor": float(factor)} if kind == "linear" and factor != 1.0 else None

    def take_factor(self, expected: float) -> None:
        """The factor of attention that goes with a scaling; another one is left for :meth:`finish`."""
        factor = self._left.get("rope.scaling.attn_factor")
        if isinstance(factor, float) and math.isclose(factor, expected, rel_tol=1e-4):
            del self._left["rope.scaling.attn_factor"]

    def wrong_head(self, key: str, value: object, expected: object) -> InputError:
        return self._wrong(key, value, f"but heads have {expected} channels")

    def finish(self) -> None:
        """Refuse what nobody has asked for and what would change the model."""
        for key, value in self._left.items():
            if not any(value == neutral for neutral in _NEUTRAL.get(key, ())):
                raise self._wrong(key, value, "which its config.json could not say")

    def _wrong(self, key: str, value: object, why: str) -> InputError:
        said = f"a list of {value.length:,}" if isinstance(value, Counted) else short(value)
        return InputError(f"{self._where} says {self._name}.{key} {said}, {why}; {_ADVICE}")


def _heads(settings: _Settings, config: Mapping[str, Any], *, has_field: bool, partly: str | None) -> dict[str, Any]:
    """Channels of a head, and what part of them is rotated.

    Args:
        settings: of the file.
        config: the fields that are known.
        has_field: whether the family always has a field for them.
        partly: field with the part that is rotated; None where all of them must be.
    """
    found = {key: settings.take(key) for key in _HEAD}
    keys, values, rotated = (found[key] for key in _HEAD)
    usual = config["hidden_size"] // config["num_attention_heads"] if config["num_attention_heads"] else 0
    size = keys or usual
    for key, value in zip(_HEAD, (keys, values, rotated), strict=True):
        if value not in (None, size) and not (partly and key == "rope.dimension_count" and 0 < value < size):
            raise settings.wrong_head(key, value, size)
    fields: dict[str, Any] = {"head_dim": size} if has_field or size != usual else {}
    return fields | ({partly: rotated / size} if partly and size and rotated not in (None, size) else {})


def _particular(row: GgufArchitecture, header: GgufHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that follow from others, as llama.cpp has it."""
    if row.name in ("gemma2", "gemma3"):
        # The largest of each has another scale than the size of its heads.
        largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[row.name]
        usual = config["hidden_size"] // max(config["num_attention_heads"], 1)
        windows = {} if row.name == "gemma2" else {"sliding_window_pattern": 6}
        return {"query_pre_attn_scalar": usual if largest else config["head_dim"], **windows}
    if row.name == "phi3" and not config.get("sliding_window"):
        return {"sliding_window": None}
    if row.name == "gpt2" and config["n_inner"] == 4 * config["n_embd"]:
        return {"n_inner": None}  # as its config.json has it
    if row.name == "starcoder2":
        return {"use_bias": "blk.0.attn_q.bias" in header.tensors}
    if row.name == "llama":
        return {
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        }
    return {}


def _llama3(found: Sequence[float], config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """LLaMA 3.1's rotary scaling from the table of factors that stands for it in a file.

    Raises:
        InputError: the table is another one.
    """
    factor, size, base = max(found), 2 * len(found), config["rope_theta"] or 1.0
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    context = _LLAMA3["original_max_position_embeddings"]
    table = []
    for channel in range(0, size, 2):
        turns = context / (2 * math.pi * base ** (channel / size))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        table.append(1 / ((1 - smooth) / max(factor, 1.0) + smooth))
    same = all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(found, table, strict=True))
    if not same or size != config["head_dim"]:
        raise InputError(
            f"{where} has a table of rotary factors ({ROPE_FREQS}) that is not LLaMA 3.1's, which config.json could "
            f"not say; {_ADVICE}"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _longrope(settings: _Settings, tables: Mapping[str, Sequence[float]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Phi-3's rotary scaling from its tables; the factor of attention follows from its contexts."""
    longest, first = config["max_position_embeddings"], config.get("original_max_position_embeddings") or 0
    if longest > first > 1:
        settings.take_factor(math.sqrt(1 + math.log(longest / first) / math.log(first)))
    return {"type": "longrope", "short_factor": list(tables[ROPE_SHORT]), "long_factor": list(tables[ROPE_LONG])}


def _main_type(header: GgufHeader) -> str:
    """The torch type that most of the weights are read in."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        code = stored_code(tensor.type)
        sizes[code] = sizes.get(code, 0) + math.prod(tensor.shape)
    return DTYPES[max(sizes, key=lambda code: sizes[code])][1] if sizes else "float32"


def stored_code(type_: str) -> str:
    """The type in which a tensor of one of GGML's types is read: its own, or float32 for a quantised one.

    >>> stored_code("BF16"), stored_code("Q4_K")
    ('BF16', 'F32')
    """
    return type_ if type_ in CODES.values() else "F32"


def quantised_types(header: GgufHeader) -> str:
    """The types of a file's quantised tensors, the one of most weights first; empty where there are none."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        if tensor.type not in CODES.values():
            sizes[tensor.type] = sizes.get(tensor.type, 0) + math.prod(tensor.shape)
    return listing(sorted(sizes, key=lambda name: -sizes[name]), 8)
