"""Falcon H1: attention and Mamba 2 side by side in every block, and a factor wherever something is handed on."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, separate
from svdconvert.families.mamba import FIELDS, mamba_linears, mamba_state
from svdconvert.families.rotary import Rotary, rope_parameters
from svdconvert.families.row import Config, Pieces, Shapes
from svdconvert.families.values import FACTOR, NUMBER, SIZE_OR_DEFAULT, SWITCH
from svdconvert.fields import few, optional


def _linears(config: Config) -> Linears:
    bias = bool(config.get("attention_bias"))
    linears = separate(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias")))
    own = {name.replace("mlp.", "feed_forward."): linear for name, linear in linears.items()}
    return {**mamba_linears(config, out_bias=bool(config.get("projectors_bias"))), **own}


def _state(config: Config) -> Shapes:
    return mamba_state(config, norm=bool(config.get("mamba_rms_norm")))


def _without_base(config: Config) -> str:
    """Transformers 4 would compute with 100,000, and 5 with 10,000."""
    if config.get("rope_theta") is not None or rope_parameters(config).get("rope_theta") is not None:
        return ""
    return "and no rope_theta, for which versions of transformers have different defaults; add it to its config.json"


ROW = decoder(
    "falcon_h1",
    "FalconH1",
    decoder_shapes(_linears, norms=("input_layernorm", "pre_ff_layernorm"), others=_state, final="final_layernorm"),
    targets=(
        "mamba.in_proj",
        "mamba.out_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "feed_forward.gate_proj",
        "feed_forward.up_proj",
        "feed_forward.down_proj",
    ),
    mixer="FalconH1Mixer",
    fills=True,
    refused=_without_base,
    pieces=Pieces(("embed_tokens",), "layers", ("final_layernorm",), logits="times lm_head_multiplier"),
    config_overrides=Rotary(theta=100000.0),
    classifies=False,
    labels="",
    since=(4, 53),
    title="Falcon H1",
    fields={
        **FIELDS,
        "mamba_d_ssm": SIZE_OR_DEFAULT,
        **dict.fromkeys(("mamba_rms_norm", "mamba_norm_before_gate", "projectors_bias"), SWITCH),
        **dict.fromkeys(
            "lm_head_multiplier key_multiplier attention_in_multiplier attention_out_multiplier ssm_in_multiplier "
            "ssm_out_multiplier".split(),
            FACTOR,
        ),
        "mlp_multipliers": optional(few(NUMBER, 2, 2)),
        "ssm_multipliers": optional(few(NUMBER, 5, 5)),
    },
    models="Falcon H1 0.5B to 34B",
    remarks="Mamba 2 beside attention in every block, factors wherever something is handed on",
    tiny={
        "mamba_d_ssm": 128,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 14,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "projectors_bias": True,
        "rope_theta": 1000.0,
        "lm_head_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "key_multiplier": 0.8,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 1.1,
        "ssm_out_multiplier": 0.6,
        "mlp_multipliers": [0.8, 0.7],
        "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
    },
)
