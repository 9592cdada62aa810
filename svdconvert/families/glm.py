"""GLM: a LLaMA with both inputs of the gate in one matrix, and rotary positions in half of the channels."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, separate, widths
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config

TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)


def linears(config: Config) -> Linears:
    """A block's six linear layers."""
    hidden, _, _, inner = widths(config)
    found = separate(config, qkv_bias=bool(config.get("attention_bias", True)))
    return {"mlp.gate_up_proj": ((2 * inner, hidden), False)} | {name: found[name] for name in TARGETS if name in found}


ROW = decoder(
    "glm",
    "Glm",
    decoder_shapes(linears),
    targets=TARGETS,
    config_overrides=Rotary(fraction=0.5),
    title="GLM",
    models="GLM-4 9B of 2024, GLM-Edge",
    remarks="gate and up in one, half of the channels rotated, biases on q, k, v",
    # transformers 4.46 takes the size of heads for that of the hidden states divided by their number
    tiny={"head_dim": 16, "rope_theta": 1000.0},
)
