"""GLM-4 of 2025: GLM with two more norms in a block."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import NORMS, PIECES, decoder, decoder_shapes
from svdconvert.families.glm import TARGETS, linears
from svdconvert.families.rotary import Rotary

ROW = decoder(
    "glm4",
    "Glm4",
    decoder_shapes(linears, norms=(*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")),
    targets=TARGETS,
    config_overrides=Rotary(fraction=0.5),
    # a norm comes between a block's layers and the sum
    pieces=replace(PIECES, writers=()),
    since=(4, 52),
    title="GLM-4",
    models="GLM-4 and GLM-Z1 of 2025",
    remarks="GLM with two more norms in a block",
    tiny={"head_dim": 32, "rope_theta": 1000.0},
)
