"""OLMoE: an OLMo whose MLPs are mixtures of many small experts."""

from __future__ import annotations

from svdconvert.families.decoder import (
    TARGETS,
    attention_biased_by_config,
    decoder,
    decoder_shapes,
    wide_head_norms,
)
from svdconvert.families.experts import Experts
from svdconvert.families.mixture import mixture_shapes, number_of_experts
from svdconvert.families.values import FACTOR, SWITCH, given, whole

_EXPERTS = Experts(
    mixture="mlp",
    names=("gate_proj", "up_proj", "down_proj"),
    count=number_of_experts,
    width=lambda config: int(config["intermediate_size"]),
)

ROW = decoder(
    "olmoe",
    "Olmoe",
    mixture_shapes(decoder_shapes(attention_biased_by_config, others=wide_head_norms), _EXPERTS),
    targets=(*(name for name in TARGETS if not name.startswith("mlp.")), *_EXPERTS.targets),
    experts=_EXPERTS,
    title="OLMoE",
    classifies=False,
    labels="",
    fields={
        **dict.fromkeys(("num_experts", "num_experts_per_tok"), given(whole(1, 100_000))),
        "clip_qkv": FACTOR,
        "norm_topk_prob": SWITCH,
    },
    models="OLMoE 1B-7B",
    remarks="experts, norms of queries and keys over all heads",
    tiny={"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 2.0},
)
