"""Qwen 3 Next: gated delta nets in three of four blocks, attention with gated outputs in the others, and experts."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, TARGETS, Linears, decoder, decoder_shapes
from svdconvert.families.experts import Experts
from svdconvert.families.hybrid import (
    DELTA_NET_FIELDS,
    FULL,
    LINEAR,
    delta_net_sizes,
    delta_net_state,
    gated_queries,
    mixed_shapes,
    mlp,
    one_kind_in,
)
from svdconvert.families.mixture import mixture_shapes
from svdconvert.families.qwen3_moe import COUNT, is_mixture
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import SWITCH, whole
from svdconvert.fields import many, optional

_SHARED = "shared_expert"


def _linears(config: Config) -> Linears:
    """The linear layers of a block with a delta net, whose queries, keys, values and gates are one projection."""
    hidden, (keys, values, heads) = config["hidden_size"], delta_net_sizes(config)
    return {
        "linear_attn.in_proj_qkvz": ((2 * keys + 2 * values, hidden), False),
        "linear_attn.in_proj_ba": ((2 * heads, hidden), False),
        "linear_attn.out_proj": ((hidden, values), False),
        **mlp(config),
    }


def _shared_expert(config: Config) -> Shapes:
    hidden, inner = config["hidden_size"], config["shared_expert_intermediate_size"]
    return {
        f"{_SHARED}.gate_proj.weight": (inner, hidden),
        f"{_SHARED}.up_proj.weight": (inner, hidden),
        f"{_SHARED}.down_proj.weight": (hidden, inner),
        f"{_SHARED}_gate.weight": (1, hidden),
    }


_EXPERTS = Experts(
    mixture="mlp",
    names=("gate_proj", "up_proj", "down_proj"),
    count=lambda config: int(config["num_experts"]),
    width=lambda config: int(config["moe_intermediate_size"]),
    beside=_shared_expert,
)

ROW = decoder(
    "qwen3_next",
    "Qwen3Next",
    mixture_shapes(
        mixed_shapes(
            one_kind_in("full_attention_interval", 4),
            {
                LINEAR: decoder_shapes(_linears, others=delta_net_state),
                FULL: decoder_shapes(gated_queries, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
            },
        ),
        _EXPERTS,
        is_mixture,
    ),
    targets=(
        "linear_attn.in_proj_qkvz",
        "linear_attn.out_proj",
        *TARGETS,
        *(f"mlp.{_SHARED}.{name}" for name in _EXPERTS.names),
        *_EXPERTS.targets,
    ),
    kinds={"linear_attn": LINEAR, "self_attn": FULL},
    gates=("linear_attn.in_proj_ba", f"mlp.{_SHARED}_gate"),
    predictors=("mtp.",),
    pieces=replace(PIECES, writers=(*PIECES.writers, "linear_attn.out_proj")),
    config_overrides=Rotary(fraction=0.25),
    experts=_EXPERTS,
    since=(4, 57),
    title="Qwen 3 Next",
    fields={
        **dict.fromkeys("num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size".split(), COUNT),
        "num_experts": COUNT,
        **DELTA_NET_FIELDS,
        "decoder_sparse_step": optional(whole(1)),
        "mlp_only_layers": optional(many(whole(0))),
        "norm_topk_prob": SWITCH,
    },
    models="Qwen3-Next-80B-A3B",
    remarks="gated delta nets in three of four blocks, gated attention in the others, experts, one for all tokens",
    # the first block has one MLP
    tiny={
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "layer_types": [LINEAR, FULL, LINEAR],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 48,
        "linear_conv_kernel_dim": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
)
