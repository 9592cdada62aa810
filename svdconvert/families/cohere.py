"""Command R: attention and MLP side by side, layer norms without biases, scaled logits."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, attention_biased_by_config, decoder, decoder_shapes, head_size
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import FACTOR, SWITCH


def _head_norms(config: Config) -> Shapes:
    if not config.get("use_qk_norm"):
        return {}
    heads, size = config["num_attention_heads"], head_size(config)
    groups = config.get("num_key_value_heads") or heads
    return {"self_attn.q_norm.weight": (heads, size), "self_attn.k_norm.weight": (groups, size)}


ROW = decoder(
    "cohere",
    "Cohere",
    decoder_shapes(attention_biased_by_config, norms=("input_layernorm",), others=_head_norms),
    config_overrides=Rotary(theta=500000.0),
    pieces=replace(PIECES, logits="times logit_scale"),
    kept=("logit_scale",),
    tied=True,
    classifies=False,
    labels="",
    fields={"logit_scale": FACTOR, "use_qk_norm": SWITCH},
    title="Command R",
    models="Command R, Command R+, Aya 23",
    remarks="parallel attention and MLP, norms of queries and keys by the head, scaled logits, tied head",
    tiny={"use_qk_norm": True, "logit_scale": 0.5, "rope_theta": 1000.0},
)
