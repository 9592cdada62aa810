"""Granite: a LLaMA with scaled embeddings, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, biased_by_config, decoder, decoder_shapes
from svdconvert.families.values import DIVISOR, FACTOR

ROW = decoder(
    "granite",
    "Granite",
    decoder_shapes(biased_by_config),
    # a factor comes between a block's layers and the sum
    pieces=replace(PIECES, writers=(), logits="divided by logits_scaling"),
    classifies=False,
    labels="",
    fields={
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier"), FACTOR),
        "logits_scaling": DIVISOR,
    },
    models="Granite 3 (dense)",
    remarks="scaled embeddings, residuals and logits",
    tiny={
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    llama_cpp={},
)
