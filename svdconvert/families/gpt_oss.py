"""gpt-oss: a mixture of experts with biases, whose attention has sinks and, in every second block, a window."""

from __future__ import annotations

from svdconvert.families.decoder import TARGETS, Linears, decoder, decoder_shapes, separate
from svdconvert.families.experts import Experts
from svdconvert.families.mixture import mixture_shapes
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import ABOVE_0, FACTOR, given, whole
from svdconvert.fields import TEXT, many, optional

_EXPERTS = Experts(
    mixture="mlp",
    names=("gate_up_proj", "down_proj"),
    count=lambda config: int(config["num_local_experts"]),
    width=lambda config: int(config["intermediate_size"]),
    field="num_local_experts",
    router="router",
    biased=True,
    clamped=True,
    alternating=True,
    transposed=True,
    scattered=True,
    multiplied_out=("mxfp4",),
)


def _linears(config: Config) -> Linears:
    bias = config.get("attention_bias") is not False
    return separate(config, qkv_bias=bias, o_bias=bias)


def _sinks(config: Config) -> Shapes:
    return {"self_attn.sinks": (config["num_attention_heads"],)}


ROW = decoder(
    "gpt_oss",
    "GptOss",
    mixture_shapes(decoder_shapes(_linears, others=_sinks), _EXPERTS),
    targets=(*(name for name in TARGETS if not name.startswith("mlp.")), *_EXPERTS.targets),
    config_overrides=Rotary(
        theta=150000.0,
        scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    experts=_EXPERTS,
    since=(4, 57),
    title="gpt-oss",
    fields={
        **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), given(whole(1, 100_000))),
        "swiglu_limit": optional(ABOVE_0),
        "swiglu_alpha": FACTOR,
        "layer_types": optional(many(TEXT)),
    },
    models="gpt-oss-20b, gpt-oss-120b",
    remarks="experts with biases, gate and up in one, MXFP4 in files; attention sinks, windows in every second block",
    tiny={
        "head_dim": 32,
        "sliding_window": 7,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,
        "swiglu_alpha": 1.2,
        "rope_theta": 1000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 8,
        },
    },
)
