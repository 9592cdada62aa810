"""ERNIE 4.5, dense: a LLaMA whose rotation pairs neighbouring channels."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, separate
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config
from svdconvert.families.values import SWITCH


def _linears(config: Config) -> Linears:
    bias = bool(config.get("use_bias"))
    return separate(config, qkv_bias=bias, o_bias=bias, mlp_bias=bias)


ROW = decoder(
    "ernie4_5",
    "Ernie4_5",
    decoder_shapes(_linears),
    config_overrides=Rotary(theta=500000.0),
    tied=True,
    classifies=False,
    labels="",
    since=(4, 54),
    fields={"use_bias": SWITCH},
    title="ERNIE 4.5",
    models="ERNIE 4.5 0.3B",
    remarks="neighbouring channels rotated, tied head",
    tiny={"head_dim": 32, "use_bias": True, "rope_theta": 1000.0},
)
