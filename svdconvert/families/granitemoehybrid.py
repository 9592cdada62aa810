"""Granite 4: Mamba 2 in most blocks, attention in the others, Granite's factors, and in some models experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from svdconvert.families.decoder import PIECES, Linears, decoder, decoder_shapes, separate
from svdconvert.families.experts import Experts
from svdconvert.families.hybrid import FULL, LINEAR, kinds_field, mixed_shapes
from svdconvert.families.mamba import FIELDS, mamba_linears, mamba_state
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import DIVISOR, FACTOR, SIZE, whole
from svdconvert.fields import TEXT, optional

# The names of kinds that older versions insist on and newer ones understand; those write the others.
_OLD = {LINEAR: "mamba", FULL: "attention"}


def _kinds(config: Config) -> list[str]:
    """Kind of each block, by its old name."""
    listed = config.get("layer_types")
    names = [LINEAR] * config["num_hidden_layers"] if listed is None else listed
    return [_OLD.get(name, name) for name in names]


@dataclass(frozen=True)
class OldNames(Rotary):
    """Config -> the rotary settings, and kinds of blocks by the names that every version of transformers reads."""

    def __call__(self, config: Config) -> dict[str, Any]:
        """The fields that are written."""
        return super().__call__(config) | {"layer_types": _kinds(config)}


def _mlp(config: Config) -> Linears:
    hidden, inner = config["hidden_size"], config["shared_intermediate_size"]
    return {
        "shared_mlp.input_linear": ((2 * inner, hidden), False),
        "shared_mlp.output_linear": ((hidden, inner), False),
    }


def _attention(config: Config) -> Linears:
    bias = bool(config.get("attention_bias"))
    linears = separate({"intermediate_size": 0, **config}, qkv_bias=bias, o_bias=bias)
    return {**{name: linear for name, linear in linears.items() if name.startswith("self_attn.")}, **_mlp(config)}


def _mamba(config: Config) -> Linears:
    return {**mamba_linears(config, out_bias=bool(config.get("mamba_proj_bias"))), **_mlp(config)}


_EXPERTS = Experts(
    mixture="block_sparse_moe",
    names=("gate_up_proj", "down_proj"),
    count=lambda config: int(config.get("num_local_experts", 8) or 0),
    width=lambda config: int(config["intermediate_size"]),
    field="num_local_experts",
    mixture_5="block_sparse_moe",
    router="router",
    files={
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    },
    since=(5, 13),
)


def _mixture(config: Config) -> Shapes:
    return _EXPERTS.shapes(config) if _EXPERTS.count(config) else {}


def _mamba_beside(config: Config) -> Shapes:
    return mamba_state(config) | _mixture(config)


ROW = decoder(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    mixed_shapes(
        _kinds,
        {
            "mamba": decoder_shapes(_mamba, others=_mamba_beside),
            "attention": decoder_shapes(_attention, others=_mixture),
        },
    ),
    targets=(
        "mamba.in_proj",
        "mamba.out_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "shared_mlp.input_linear",
        "shared_mlp.output_linear",
        *_EXPERTS.targets,
    ),
    kinds={"mamba": LINEAR, "self_attn": FULL},
    old_kinds=_OLD,
    experts=_EXPERTS,
    mixer="GraniteMoeHybridMambaLayer",
    pieces=replace(PIECES, writers=(), logits="divided by logits_scaling"),
    config_overrides=OldNames(),
    classifies=False,
    labels="",
    kept=("logits_scaling",),
    # transformers 4 cannot build it without weights; what is written loads there
    since=(5, 0),
    title="Granite 4",
    fields={
        **FIELDS,
        "num_local_experts": optional(whole(0, 100_000)),
        "num_experts_per_tok": optional(whole(0, 100_000)),
        "shared_intermediate_size": SIZE,
        "residual_multiplier": FACTOR,
        "logits_scaling": DIVISOR,
        "position_embedding_type": optional(TEXT),
        "layer_types": kinds_field(*_OLD.values(), *_OLD),
    },
    models="Granite 4.0: h-tiny, h-small (from 5.13 on), micro, h-micro, 1b, h-1b, 350m, h-350m",
    remarks="Mamba 2 in most blocks, gate and up in one, experts beside the MLP in some models, scaled embeddings, "
    "residuals and logits",
    tiny={
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 128,
        "position_embedding_type": "rope",
        "rope_theta": 1000.0,
        "mamba_n_heads": 4,
        "mamba_d_state": 14,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
        "mamba_proj_bias": True,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
)
