"""Tiny GGUF files, written by llama.cpp's own package the way its converter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from support.families import VOCAB, stock_model

# Settings of the tiny models that transformers' own reader does not take from a file but has a default for.
AS_TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rope_scaling": None, "attention_bias": False, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128, "use_sliding_window": False},
    "gemma2": {},
    "gemma3_text": {
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 32,
        "rope_parameters": None,
        "rope_theta": 1000.0,
    },
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": None},
    "starcoder2": {"sliding_window": None},
    "gpt2": {"n_inner": None, "max_position_embeddings": 1024},
}
NAMES = {name: name.removesuffix("_text") for name in AS_TRANSFORMERS} | {"mistral": "llama"}

Values = np.ndarray[Any, Any]


def tiny(model_type: str, **changes: Any) -> Any:
    """The tiny model of a family with settings that a GGUF file has."""
    return stock_model(model_type, **{**AS_TRANSFORMERS[model_type], **changes})


def gguf_tensors(model: Any) -> dict[str, Values]:
    """The model's tensors as llama.cpp's converter names and orders them, float32."""
    kind = model.config.model_type
    name = NAMES[kind]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        own = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert own is not None, key
        values = tensor.float().numpy()
        if name == "llama" and (".attn_q." in own or ".attn_k." in own):
            heads = model.config.num_key_value_heads if ".attn_k." in own else model.config.num_attention_heads
            # as LlamaModel.permute of convert_hf_to_gguf.py
            values = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = values.swapaxes(1, 2).reshape(tensor.shape)
        if name.startswith("gemma") and own.endswith("norm.weight"):
            values = values + 1
        if name == "gpt2" and own.startswith("blk.") and tensor.dim() == 2:
            values = values.T
        tensors[own] = np.ascontiguousarray(values)
    return tensors


def settings(model: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes of a config, without the architecture's name."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        return found | {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": 1e-5}
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    rope = rope.get("full_attention", rope)
    norm = "norm" if config.model_type == "starcoder2" else "norm_rms"
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]),
        f"attention.layer_{norm}_epsilon": getattr(config, "rms_norm_eps", None) or config.norm_epsilon,
    }
    if config.model_type in ("qwen3", "gemma2", "gemma3_text"):
        found |= {"attention.key_length": head, "attention.value_length": head}
    if config.model_type in ("llama", "mistral", "phi3"):
        found |= {"vocab_size": config.vocab_size, "rope.dimension_count": head}
    if config.model_type in ("gemma2", "gemma3_text"):
        found["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        found |= {cap: float(getattr(config, cap)) for cap in caps}
    return found


def write_gguf(
    path: Path,
    model: Any,
    *,
    kind: str = "F32",
    tokenizer: bool = True,
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, Values] | None = None,
    raw: Mapping[str, tuple[Values, GGMLQuantizationType]] | None = None,
    **options: Any,
) -> Path:
    """Write a model.

    Args:
        path: the file.
        model: a transformers model of one of the families of :data:`NAMES`.
        kind: GGML's type of the matrices; vectors are float32.
        tokenizer: whether the file has one.
        changes: to the metadata, by key; None removes one.
        extra: further tensors.
        raw: tensors whose blocks are given, with their type.
        options: of the writer: ``split_max_tensors``.
    """
    name = NAMES[model.config.model_type]
    writer = GGUFWriter(path, name, **options)
    metadata = {"general.name": "tiny"} | {f"{name}.{key}": value for key, value in settings(model).items()}
    if tokenizer:
        metadata |= byte_level()
    for key, value in (metadata | dict(changes or {})).items():
        if value is not None:
            add_value(writer, key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    for own, values in (gguf_tensors(model) | dict(extra or {})).items():
        if own in (raw or {}):
            blocks, number = dict(raw or {})[own]
            writer.add_tensor(own, blocks, raw_dtype=number)
        else:
            add_tensor(writer, own, values, kind if values.ndim > 1 else "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """One entry of the metadata, of the type that llama.cpp's converter would give it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def add_tensor(writer: GGUFWriter, name: str, values: Values, kind: str) -> None:
    """One tensor, rounded to a type."""
    if kind == "F64":
        writer.add_tensor(name, values.astype(np.float64))
        return
    number = GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)


def byte_level() -> dict[str, Any]:
    """A byte-level vocabulary of :data:`VOCAB` tokens, with merges, special tokens and a chat template."""
    from tokenizers import pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - len(special) - 2]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*special, *letters, "th", "the"],
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(letters) + 2),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def as_transformers_reads(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file as transformers has them, in float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return dict(model.state_dict())
