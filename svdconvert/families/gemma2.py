"""Gemma 2: a LLaMA with two more norms in a block, soft caps, and a window in every second block."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import NORMS, PIECES, biased_by_config, decoder, decoder_shapes
from svdconvert.families.values import DIVISOR
from svdconvert.fields import TEXT, optional

ROW = decoder(
    "gemma2",
    "Gemma2",
    decoder_shapes(biased_by_config, norms=(*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")),
    # a norm comes between a block's layers and the sum
    pieces=replace(PIECES, writers=(), logits="soft-capped"),
    tied=True,
    fields={
        **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), DIVISOR),
        "hidden_activation": optional(TEXT),
    },
    title="Gemma 2",
    models="Gemma 2",
    remarks="soft caps, alternating windows, tied head",
    tiny={
        "head_dim": 32,
        "sliding_window": 7,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    llama_cpp={},
)
