"""OLMo 1: a LLaMA whose norms have no weights, with clipped queries, keys and values."""

from __future__ import annotations

from svdconvert.families.decoder import attention_biased_by_config, decoder, decoder_shapes
from svdconvert.families.values import DIVISOR

ROW = decoder(
    "olmo",
    "Olmo",
    decoder_shapes(attention_biased_by_config, norms=(), final=""),
    # transformers has a sequence classifier of it only later
    classifies=False,
    labels="",
    fields={"clip_qkv": DIVISOR},
    title="OLMo",
    models="OLMo 1",
    remarks="norms without weights, clipped queries, keys and values",
    tiny={"clip_qkv": 1.5, "rope_theta": 1000.0},
)
