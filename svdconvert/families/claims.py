"""What fields of config.json may hold in any family of the table; a family's own are in its row. No torch.

Other mistakes show when the stock class is built from the config (``models/preflight.py``). These are checked before
anything is computed from them, or built as large as they say.
"""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.errors import InputError
from svdconvert.families.rotary import contradiction
from svdconvert.families.row import Architecture, Config
from svdconvert.families.values import (
    ABOVE_0,
    BLOCKS,
    DIVISOR,
    EPSILON,
    FACTOR,
    SIZE,
    SIZE_OR_DEFAULT,
    SWITCH,
    given,
    whole,
)
from svdconvert.fields import OBJECT, TEXT, Kind, either, many, optional, problem, record, table
from svdconvert.tensors import CODES

_TOKEN = whole(-1)  # the first LLaMA's padding is -1
_ROPE = record(dict.fromkeys(("rope_theta", "factor"), optional(ABOVE_0)))
_DTYPE = Kind("a type of torch, float16 or bfloat16 say", lambda value: isinstance(value, str) and value in CODES)

FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys("vocab_size hidden_size num_attention_heads max_position_embeddings".split(), SIZE),
    **dict.fromkeys("num_key_value_heads head_dim intermediate_size".split(), SIZE_OR_DEFAULT),
    "num_hidden_layers": BLOCKS,
    "sliding_window": optional(whole(1)),
    **dict.fromkeys("bos_token_id eos_token_id pad_token_id".split(), optional(either(_TOKEN, many(_TOKEN)))),
    "num_labels": optional(whole(1, 1_000_000)),
    **dict.fromkeys("attention_dropout initializer_range partial_rotary_factor".split(), FACTOR),
    **dict.fromkeys("rms_norm_eps layer_norm_eps".split(), EPSILON),
    "rope_theta": DIVISOR,
    **dict.fromkeys("rope_scaling rope_parameters".split(), optional(_ROPE)),
    **dict.fromkeys("tie_word_embeddings attention_bias mlp_bias".split(), SWITCH),
    "hidden_act": optional(TEXT),
    **dict.fromkeys("torch_dtype dtype".split(), optional(_DTYPE)),
    "svd_ranks": given(table(whole(1))),
    "svd_shared": optional(table(TEXT)),
    "svd_layout": given(TEXT),
    **dict.fromkeys("attn_implementation _attn_implementation".split(), optional(either(TEXT, OBJECT))),
}


def check_claims(config: Config, row: Architecture, where: str) -> None:
    """Check types and ranges of the fields that shapes follow from.

    Args:
        config: config.json.
        row: its family.
        where: the checkpoint, for messages.

    Raises:
        InputError: a field, which is named, has a value that no model of the family can have.
    """
    if wrong := problem(config, {**FIELDS, **row.fields}):
        raise InputError(f"config.json of {where} cannot be used: {wrong}; correct it")
    if both := contradiction(config):
        raise InputError(
            f"config.json of {where} says {both}, and versions of transformers disagree on which of them counts; "
            "remove the wrong one"
        )
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise InputError(
            f"config.json of {where} says num_attention_heads {heads} and num_key_value_heads {groups}, but the first "
            "must be a multiple of the second; correct it"
        )
    kinds, blocks = config.get("layer_types"), config.get("num_hidden_layers")
    if "layer_types" in row.fields and kinds and blocks and len(kinds) != blocks:
        raise InputError(
            f"config.json of {where} says num_hidden_layers {blocks}, but has {len(kinds)} layer_types; correct it"
        )
