"""Ministral 3: Mistral whose queries grow with their positions."""

from __future__ import annotations

from svdconvert.families.decoder import decoder, decoder_shapes, separate

ROW = decoder(
    "ministral3",
    "Ministral3",
    decoder_shapes(separate),
    since=(5, 0),
    # all that transformers 5 has of them, which no version 4 can read
    config_overrides=lambda config: {},
    title="Ministral 3",
    models="Ministral 3, Devstral 2, text alone",
    remarks="yarn, queries that grow with their positions",
    tiny={
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
)
