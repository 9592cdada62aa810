"""Helium: a LLaMA whose rotation pairs neighbouring channels."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, separate
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config


def _linears(config: Config) -> Linears:
    return separate(config, qkv_bias=bool(config.get("attention_bias")), mlp_bias=bool(config.get("mlp_bias")))


ROW = decoder(
    "helium",
    "Helium",
    decoder_shapes(_linears),
    config_overrides=Rotary(theta=100000.0),
    since=(4, 49),
    models="Helium 1",
    remarks="neighbouring channels rotated",
    tiny={"head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_theta": 1000.0},
)
