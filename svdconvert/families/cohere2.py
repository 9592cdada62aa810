"""Command R7B: Command R with a window in three of four blocks, and rotary positions in those alone."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, attention_biased_by_config, decoder, decoder_shapes
from svdconvert.families.values import FACTOR, whole
from svdconvert.fields import optional

ROW = decoder(
    "cohere2",
    "Cohere2",
    decoder_shapes(attention_biased_by_config, norms=("input_layernorm",)),
    pieces=replace(PIECES, logits="times logit_scale"),
    kept=("logit_scale",),
    tied=True,
    classifies=False,
    labels="",
    # versions before have the windows by another field than those after
    since=(4, 53),
    fields={"logit_scale": FACTOR, "sliding_window_pattern": optional(whole(1))},
    title="Command R7B",
    models="Command A, Command R7B",
    remarks="parallel attention and MLP, windows in three of four blocks, scaled logits, tied head",
    tiny={
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "logit_scale": 0.5,
        "rope_theta": 1000.0,
    },
)
