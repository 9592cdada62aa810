"""AFM of Arcee: a LLaMA with an MLP without a gate, whose activation is a squared ReLU."""

from __future__ import annotations

from svdconvert.families.decoder import UNGATED, decoder, decoder_shapes, ungated_biased_by_config

ROW = decoder(
    "arcee",
    "Arcee",
    decoder_shapes(ungated_biased_by_config),
    targets=UNGATED,
    since=(4, 53),
    models="Arcee AFM",
    remarks="no gate, squared ReLU",
    tiny={"attention_bias": True, "mlp_bias": True, "rope_theta": 1000.0},
)
