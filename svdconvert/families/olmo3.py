"""OLMo 3: OLMo 2 with a sliding window in three of four blocks, whose rotary positions are not scaled."""

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
    "olmo3",
    "Olmo3",
    decoder_shapes(attention_biased_by_config, norms=POST_NORMS, others=wide_head_norms),
    # transformers 4 does not read the rotary settings of 5, which has them by kind of layer
    since=(5, 0),
    config_overrides=lambda config: {},
    # a norm comes between a block's layers and the sum
    pieces=replace(PIECES, writers=()),
    classifies=False,
    labels="",
    title="OLMo 3",
    models="OLMo 3",
    remarks="OLMo 2 with windows in three of four blocks",
    tiny={
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
)
