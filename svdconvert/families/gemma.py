"""Gemma: a LLaMA with scaled embeddings and heads wider than its hidden states."""

from __future__ import annotations

from svdconvert.families.decoder import biased_by_config, decoder, decoder_shapes
from svdconvert.fields import TEXT, optional

ROW = decoder(
    "gemma",
    "Gemma",
    decoder_shapes(biased_by_config),
    tied=True,
    fields={"hidden_activation": optional(TEXT)},
    models="Gemma 1, CodeGemma",
    remarks="scaled embeddings, wide heads, tied head",
    tiny={"head_dim": 32, "rope_theta": 1000.0},
)
