"""StableLM: a LLaMA with layer norms, and rotary positions in a quarter of the channels."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, head_size, separate
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import FACTOR, SWITCH


def _linears(config: Config) -> Linears:
    return separate(config, qkv_bias=bool(config.get("use_qkv_bias")))


def _norms(config: Config) -> Shapes:
    """The second norm, which side by side with attention the MLP does without, and those of each head."""
    found: Shapes = {}
    if not config.get("use_parallel_residual"):
        found |= {f"post_attention_layernorm.{kind}": (config["hidden_size"],) for kind in ("weight", "bias")}
    if config.get("qk_layernorm"):
        heads = config["num_attention_heads"]
        for name, count in (("q", heads), ("k", config.get("num_key_value_heads") or heads)):
            for head in range(count):
                found[f"self_attn.{name}_layernorm.norms.{head}.weight"] = (head_size(config),)
    return found


ROW = decoder(
    "stablelm",
    "StableLm",
    decoder_shapes(_linears, norms=("input_layernorm",), norm_biases=True, others=_norms),
    config_overrides=Rotary(fraction=0.25),
    fields={
        **dict.fromkeys(("use_qkv_bias", "qk_layernorm", "use_parallel_residual"), SWITCH),
        "hidden_dropout": FACTOR,
    },
    title="StableLM",
    models="StableLM 3B, StableLM 2",
    remarks="layer norms, a quarter of the channels rotated, norms by the head (12B)",
    tiny={"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
)
