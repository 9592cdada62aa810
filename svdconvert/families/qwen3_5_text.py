"""Qwen 3.5, text alone: gated delta nets in three of four blocks, attention with gated outputs in the others."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, TARGETS, Linears, decoder, decoder_shapes
from svdconvert.families.hybrid import (
    DELTA_NET_FIELDS,
    FULL,
    LINEAR,
    delta_net_sizes,
    delta_net_state,
    gated_queries,
    mixed_shapes,
    mlp,
    one_kind_in,
)
from svdconvert.families.row import Config


def _linears(config: Config) -> Linears:
    """The linear layers of a block with a delta net, whose gates are projections of their own."""
    hidden, (keys, values, heads) = config["hidden_size"], delta_net_sizes(config)
    return {
        "linear_attn.in_proj_qkv": ((2 * keys + values, hidden), False),
        "linear_attn.in_proj_z": ((values, hidden), False),
        "linear_attn.in_proj_b": ((heads, hidden), False),
        "linear_attn.in_proj_a": ((heads, hidden), False),
        "linear_attn.out_proj": ((hidden, values), False),
        **mlp(config),
    }


ROW = decoder(
    "qwen3_5_text",
    "Qwen3_5",
    mixed_shapes(
        one_kind_in("full_attention_interval", 4),
        {
            LINEAR: decoder_shapes(_linears, others=delta_net_state),
            FULL: decoder_shapes(gated_queries, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
        },
    ),
    text="Text",
    targets=("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj", *TARGETS),
    kinds={"linear_attn": LINEAR, "self_attn": FULL},
    gates=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    predictors=("mtp.",),
    pieces=replace(PIECES, writers=(*PIECES.writers, "linear_attn.out_proj")),
    config_overrides=lambda config: {},
    since=(5, 2),
    # the first versions that have it have no classifier of it
    classifies=False,
    labels="",
    title="Qwen 3.5",
    fields=DELTA_NET_FIELDS,
    models="Qwen 3.5, text alone",
    remarks="gated delta nets in three of four blocks, gated attention in the others",
    tiny={
        "head_dim": 32,
        "layer_types": [LINEAR, FULL, LINEAR],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 48,
        "linear_conv_kernel_dim": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    },
)
