"""Qwen 3 with experts: Qwen 3 whose MLPs, or some of them, are mixtures."""

from __future__ import annotations

from svdconvert.families.decoder import TARGETS, biased_by_config, decoder, decoder_shapes
from svdconvert.families.experts import Experts
from svdconvert.families.mixture import CountedTwice, mixture_shapes, number_of_experts
from svdconvert.families.row import Config
from svdconvert.families.values import SIZE_OR_DEFAULT, SWITCH, given, whole
from svdconvert.fields import many, optional

_EXPERTS = Experts(
    mixture="mlp",
    names=("gate_proj", "up_proj", "down_proj"),
    count=number_of_experts,
    width=lambda config: int(config["moe_intermediate_size"]),
)
# Of experts, and sizes of theirs.
COUNT = given(whole(1, 100_000))


def is_mixture(config: Config, layer: int) -> bool:
    """Whether a block has experts, in Qwen 3 and Qwen 3 Next."""
    every = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % every == 0


ROW = decoder(
    "qwen3_moe",
    "Qwen3Moe",
    mixture_shapes(
        decoder_shapes(biased_by_config, head_norms=("self_attn.q_norm", "self_attn.k_norm")), _EXPERTS, is_mixture
    ),
    targets=(*TARGETS, *_EXPERTS.targets),
    config_overrides=CountedTwice(),
    experts=_EXPERTS,
    since=(4, 51),
    title="Qwen 3 with experts",
    fields={
        "use_sliding_window": SWITCH,
        "max_window_layers": SIZE_OR_DEFAULT,
        **dict.fromkeys("num_experts num_local_experts moe_intermediate_size num_experts_per_tok".split(), COUNT),
        "decoder_sparse_step": optional(whole(1)),
        "mlp_only_layers": optional(many(whole(0))),
        "norm_topk_prob": SWITCH,
    },
    models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    remarks="norms of queries and keys, experts",
    # the first block has one MLP
    tiny={
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
)
