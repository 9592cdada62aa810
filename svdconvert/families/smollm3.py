"""SmolLM 3: a LLaMA without rotary positions in every fourth block."""

from __future__ import annotations

from svdconvert.families.decoder import biased_by_config, decoder, decoder_shapes
from svdconvert.families.rotary import Rotary
from svdconvert.families.values import SWITCH, whole
from svdconvert.fields import optional

ROW = decoder(
    "smollm3",
    "SmolLM3",
    decoder_shapes(biased_by_config),
    config_overrides=Rotary(theta=2000000.0),
    tied=True,
    since=(4, 53),
    fields={"use_sliding_window": SWITCH, "no_rope_layer_interval": optional(whole(1))},
    title="SmolLM 3",
    models="SmolLM 3",
    remarks="no positions in every fourth block, tied head",
    tiny={"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7, "rope_theta": 1000.0},
)
