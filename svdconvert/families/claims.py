"""What fields of config.json may hold in any family of the table. No torch.

Whatever else a config can get wrong shows when the stock class is built from it (``models/preflight.py``); these have
to be right before anything is computed from them, and before anything is built that would be as large as they say.
"""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.errors import InputError
from svdconvert.families.row import Architecture, Config
from svdconvert.fields import FLAG, OBJECT, TEXT, Kind, either, many, optional, problem, record, table
from svdconvert.tensors import CODES


def _whole(least: int, most: int) -> Kind:
    return Kind(f"a whole number from {least} to {most:,}", lambda value: type(value) is int and least <= value <= most)


def _given(kind: Kind) -> Kind:
    """A field that may be missing but not null."""
    return Kind(kind.name, kind.fits, needed=False)


_MOST = 2**31 - 1
_TOKEN = _whole(-1, _MOST)
_NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e38)
_NOT_NEGATIVE = Kind("a number from 0 on", lambda value: _NUMBER.fits(value) and value >= 0)
_ABOVE_0 = Kind("a number above 0", lambda value: _NUMBER.fits(value) and value > 0)
_ROPE = record(dict.fromkeys(("rope_theta", "factor"), optional(_ABOVE_0)))
_DTYPE = Kind("a type of torch, float16 or bfloat16 say", lambda value: isinstance(value, str) and value in CODES)
# What there is something made for each of.
_COUNTS = {"num_hidden_layers": 10_000, "n_layer": 10_000, "num_labels": 1_000_000}

FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        "vocab_size hidden_size num_attention_heads max_position_embeddings n_embd n_head n_positions ffn_dim".split(),
        _given(_whole(1, _MOST)),
    ),
    # without them, or with 0, the class has its own
    **dict.fromkeys(
        "num_key_value_heads head_dim intermediate_size n_inner word_embed_proj_dim max_window_layers".split(),
        optional(_whole(0, _MOST)),
    ),
    "sliding_window": optional(_whole(1, _MOST)),
    # the first LLaMA's padding is -1
    **dict.fromkeys("bos_token_id eos_token_id pad_token_id".split(), optional(either(_TOKEN, many(_TOKEN)))),
    **{name: optional(_whole(1, most)) for name, most in _COUNTS.items()},
    **dict.fromkeys(
        "rotary_pct partial_rotary_factor embedding_multiplier attention_multiplier residual_multiplier "
        "attention_dropout initializer_range".split(),
        optional(_NUMBER),
    ),
    **dict.fromkeys("rms_norm_eps layer_norm_eps layer_norm_epsilon".split(), optional(_NOT_NEGATIVE)),
    # anything else is divided by, or has no power
    **dict.fromkeys(
        "rope_theta rotary_emb_base logits_scaling query_pre_attn_scalar attn_logit_softcapping "
        "final_logit_softcapping".split(),
        optional(_ABOVE_0),
    ),
    **dict.fromkeys(
        "tie_word_embeddings attention_bias mlp_bias enable_bias layer_norm_elementwise_affine do_layer_norm_before "
        "_remove_final_layer_norm use_parallel_residual use_sliding_window".split(),
        optional(FLAG),
    ),
    **dict.fromkeys("hidden_act hidden_activation activation_function".split(), optional(TEXT)),
    **dict.fromkeys("torch_dtype dtype".split(), optional(_DTYPE)),
    **dict.fromkeys("rope_scaling rope_parameters".split(), optional(_ROPE)),
    "svd_ranks": _given(table(_whole(1, _MOST))),
    "svd_shared": optional(table(TEXT)),
    "svd_layout": _given(TEXT),
    **dict.fromkeys("attn_implementation _attn_implementation".split(), optional(either(TEXT, OBJECT))),
}


def check_claims(config: Config, row: Architecture, where: str) -> None:
    """Look at the types and the ranges of what shapes and kinds follow from.

    Args:
        config: config.json.
        row: its family.
        where: the checkpoint, for messages.

    Raises:
        InputError: one is what no model of the table can have; it is named.
    """
    if wrong := problem(config, {**FIELDS, **row.fields}):
        raise InputError(f"config.json of {where} cannot be used: {wrong}; correct it")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise InputError(
            f"config.json of {where} says num_attention_heads {heads} and num_key_value_heads {groups}, but the first "
            "must be a multiple of the second; correct it"
        )
