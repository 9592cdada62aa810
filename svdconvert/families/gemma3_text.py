"""Gemma 3: Gemma 2 with norms of queries and keys in the place of its caps, and two rotary bases."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families import gemma2
from svdconvert.families.decoder import NORMS, PIECES, biased_by_config, decoder, decoder_shapes
from svdconvert.families.values import DIVISOR, SWITCH, whole
from svdconvert.fields import optional

ROW = decoder(
    "gemma3_text",
    "Gemma3",
    decoder_shapes(
        biased_by_config,
        norms=(*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
    text="Text",
    # transformers 5 reads the rotary settings of 4, but 4 not those of 5, which has them by kind of layer
    since=(5, 0),
    config_overrides=lambda config: {},
    pieces=replace(PIECES, writers=(), logits="soft-capped"),
    tied=True,
    labels="",
    fields={
        **gemma2.ROW.fields,
        "rope_local_base_freq": DIVISOR,
        "sliding_window_pattern": optional(whole(1)),
        "use_bidirectional_attention": SWITCH,
    },
    title="Gemma 3",
    models="Gemma 3, text alone",
    remarks="norms of queries and keys, two rotary bases, windows in five of six blocks, tied head",
    tiny={
        "head_dim": 32,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
)
