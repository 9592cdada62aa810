"""The kind of a model that no row of the table covers, as far as its config.json shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from svdconvert.families.row import Config

# Fields of config.json in models of other kinds.
_EXPERTS = (
    "num_experts num_local_experts n_routed_experts num_experts_per_tok moe_intermediate_size moe_num_experts moe_topk"
).split()
_SENSES = ("vision_config", "audio_config", "mm_vision_tower", "visual", "vision_tower", "thinker_config")
_RECURRENT = (
    "mamba_d_state mamba_d_ssm state_size ssm_state_size conv_L_cache lru_width linear_conv_kernel_dim "
    "attention_hidden_size ssm_cfg hybrid_override_pattern"
).split()
# Types whose configs have no such field.
_RECURRENT_TYPES = ("rwkv", "xlstm", "retnet", "hyena", "mamba")
# Lists of the layers' types, and the types that carry no state from token to token.
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")
_STATELESS = re.compile(r"(?!linear_).*attention|global|local|mlp|moe|dense|sparse")
_ENCODERS = (
    "bert roberta xlm-roberta xlm-roberta-xl camembert electra albert distilbert deberta deberta-v2 mpnet modernbert "
    "big_bird longformer convbert funnel layoutlm nomic_bert eurobert ernie esm"
).split()
_HEADS = ("ForMaskedLM", "ForPreTraining")


def kind_of(config: Config) -> str:
    """A clause that names the kind, after a comma; empty if the kind is unknown.

    >>> kind_of({"model_type": "lfm2_moe", "layer_types": ["conv", "full_attention"]})
    ', a model whose layers are not attention alone (conv)'
    """
    fields: dict[str, Any] = {}
    for inner in (config.get("ffn_config"), config.get("text_config"), config):
        fields |= dict(inner) if isinstance(inner, Mapping) else {}
    model_type = str(config.get("model_type"))
    if any(field in config for field in _SENSES):
        return ", a model that sees or hears"
    if config.get("is_encoder_decoder"):
        return ", an encoder with a decoder"
    if model_type in _ENCODERS or any(name.endswith(_HEADS) for name in _names(config.get("architectures"))):
        return ", an encoder, which writes no text"
    layers = {name for field in _LAYER_LISTS for name in _names(fields.get(field))}
    others = sorted(name for name in layers if not _STATELESS.fullmatch(name))
    experts = any(_is_more_than_one(fields.get(field)) for field in _EXPERTS)
    if others or model_type.startswith(_RECURRENT_TYPES) or any(fields.get(field) for field in _RECURRENT):
        shown = f" ({', '.join(others)})" if others else ""
        return f", a model whose layers are not attention alone{shown}{' and a mixture of experts' if experts else ''}"
    return ", a mixture of experts" if experts else ""


def quantisation_of(config: Config) -> str | None:
    """The method of a quantised checkpoint, by its config; None if it is not quantised."""
    fields = ("quantization_config", "compression_config", "quantization")
    settings = next((config[field] for field in fields if config.get(field) is not None), None)
    if settings is None:  # an empty one counts, as in transformers
        return None
    found = settings if isinstance(settings, Mapping) else {}
    if method := found.get("quant_method"):
        return str(method)
    if config.get("quantization") is not None:
        return "MLX"
    if any(str(key).startswith(("load_in_", "bnb_", "llm_int8")) for key in found):
        return "bitsandbytes"
    return "an unknown method"


def _names(value: Any) -> Iterator[str]:
    """The strings of a list."""
    return (name for name in (value if isinstance(value, list) else []) if isinstance(name, str))


def _is_more_than_one(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, (int, float)) and value not in (0, 1))
