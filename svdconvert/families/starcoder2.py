"""StarCoder 2: LLaMA's attention between layer norms, and an MLP without a gate."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, Linears, decoder, decoder_shapes, widths
from svdconvert.families.row import Config
from svdconvert.families.values import EPSILON, SWITCH


def _linears(config: Config) -> Linears:
    hidden, queries, keys, inner = widths(config)
    bias = bool(config.get("use_bias", True))
    return {
        "self_attn.q_proj": ((queries, hidden), bias),
        "self_attn.k_proj": ((keys, hidden), bias),
        "self_attn.v_proj": ((keys, hidden), bias),
        "self_attn.o_proj": ((hidden, queries), bias),
        "mlp.c_fc": ((inner, hidden), bias),
        "mlp.c_proj": ((hidden, inner), bias),
    }


ROW = decoder(
    "starcoder2",
    "Starcoder2",
    decoder_shapes(_linears, norm_biases=True),
    targets=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
    pieces=replace(PIECES, writers=("self_attn.o_proj", "mlp.c_proj")),
    tied=True,
    fields={"use_bias": SWITCH, "norm_epsilon": EPSILON},
    title="StarCoder 2",
    models="StarCoder 2",
    remarks="layer norms, no gate, biases, sliding window, tied head",
    tiny={"sliding_window": 7, "rope_theta": 1000.0},
)
