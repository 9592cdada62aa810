"""Nemotron and Minitron: layer norms, an MLP without a gate, and rotary positions in half of the channels."""

from __future__ import annotations

from svdconvert.families.decoder import UNGATED, decoder, decoder_shapes, ungated_biased_by_config
from svdconvert.families.rotary import Rotary
from svdconvert.families.values import EPSILON

ROW = decoder(
    "nemotron",
    "Nemotron",
    decoder_shapes(ungated_biased_by_config, norm_biases=True),
    targets=UNGATED,
    config_overrides=Rotary(fraction=0.5),
    fields={"norm_eps": EPSILON},
    models="Nemotron 3 and 4, Minitron",
    remarks="layer norms, no gate, squared ReLU, half of the channels rotated",
    tiny={"attention_bias": True, "mlp_bias": True, "rope_theta": 1000.0},
)
