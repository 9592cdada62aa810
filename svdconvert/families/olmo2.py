"""OLMo 2: a LLaMA with norms after attention and MLP instead of before them, and norms of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import (
    PIECES,
    POST_NORMS,
    attention_biased_by_config,
    decoder,
    decoder_shapes,
    wide_head_norms,
)

ROW = decoder(
    "olmo2",
    "Olmo2",
    decoder_shapes(attention_biased_by_config, norms=POST_NORMS, others=wide_head_norms),
    # a norm comes between a block's layers and the sum
    pieces=replace(PIECES, writers=()),
    # transformers has a sequence classifier of it since 5.0 only
    classifies=False,
    labels="",
    since=(4, 47),
    title="OLMo 2",
    models="OLMo 2",
    remarks="norms after attention and MLP, norms of queries and keys over all heads",
    tiny={"attention_bias": True, "rope_theta": 1000.0},
)
