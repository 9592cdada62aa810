"""Mixtral: a Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from svdconvert.families.decoder import TARGETS, decoder, decoder_shapes, separate
from svdconvert.families.experts import Experts
from svdconvert.families.mixture import mixture_shapes
from svdconvert.families.rotary import Rotary
from svdconvert.families.values import given, whole

_EXPERTS = Experts(
    mixture="block_sparse_moe",
    names=("w1", "w3", "w2"),
    count=lambda config: int(config["num_local_experts"]),
    width=lambda config: int(config["intermediate_size"]),
    field="num_local_experts",
)

ROW = decoder(
    "mixtral",
    "Mixtral",
    mixture_shapes(decoder_shapes(separate), _EXPERTS),
    targets=(*(name for name in TARGETS if not name.startswith("mlp.")), *_EXPERTS.targets),
    config_overrides=Rotary(theta=1e6),
    experts=_EXPERTS,
    fields=dict.fromkeys(("num_local_experts", "num_experts_per_tok"), given(whole(1, 100_000))),
    models="Mixtral 8x7B, Mixtral 8x22B",
    remarks="experts, sliding window",
    tiny={"rope_theta": 1000.0, "sliding_window": 7, "num_local_experts": 4},
)
