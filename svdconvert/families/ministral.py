"""Ministral: Mistral with a list of the blocks that have its sliding window."""

from __future__ import annotations

from svdconvert.families.decoder import decoder, decoder_shapes, separate

ROW = decoder(
    "ministral",
    "Ministral",
    decoder_shapes(separate),
    since=(5, 0),
    models="Ministral 8B of 2024",
    remarks="sliding window in some blocks",
    tiny={
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_theta": 1000.0,
        "sliding_window": 7,
        "head_dim": 32,
    },
)
