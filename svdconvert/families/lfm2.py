"""LFM 2: short gated convolutions in most blocks, attention in the others."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, widths
from svdconvert.families.hybrid import FULL, kinds_field, mixed_shapes
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Pieces, Shapes
from svdconvert.families.values import ABOVE_0, EPSILON, SIZE, SIZE_OR_DEFAULT, SWITCH, whole
from svdconvert.fields import many, optional

CONV = "conv"
_NORMS = ("operator_norm", "ffn_norm")


def _kinds(config: Config) -> list[str]:
    """Kind of each block, as config.json lists them, or by its list of those that attend."""
    if (listed := config.get("layer_types")) is not None:
        return list(listed)
    blocks, attending = range(config["num_hidden_layers"]), config.get("full_attn_idxs")
    return [FULL if attending is None or block in attending else CONV for block in blocks]


def _inner(config: Config) -> int:
    """Channels of the MLP, from what would be those of one without a gate."""
    inner = config.get("block_ff_dim") or config["intermediate_size"]
    if config.get("block_auto_adjust_ff_dim") is False:
        return int(inner)
    factor, multiple = config.get("block_ffn_dim_multiplier", 1.0), config.get("block_multiple_of") or 256
    inner = int(2 * inner / 3)
    return inner if factor is None else -(-int(factor * inner) // multiple) * multiple


def _mlp(config: Config) -> Linears:
    hidden, inner = config["hidden_size"], _inner(config)
    return {
        "feed_forward.w1": ((inner, hidden), False),
        "feed_forward.w3": ((inner, hidden), False),
        "feed_forward.w2": ((hidden, inner), False),
    }


def _attention(config: Config) -> Linears:
    hidden, queries, keys, _ = widths({**config, "intermediate_size": 0})
    return {
        "self_attn.q_proj": ((queries, hidden), False),
        "self_attn.k_proj": ((keys, hidden), False),
        "self_attn.v_proj": ((keys, hidden), False),
        "self_attn.out_proj": ((hidden, queries), False),
        **_mlp(config),
    }


def _convolution(config: Config) -> Linears:
    hidden, bias = config["hidden_size"], bool(config.get("conv_bias"))
    return {
        "conv.in_proj": ((3 * hidden, hidden), bias),
        "conv.out_proj": ((hidden, hidden), bias),
        **_mlp(config),
    }


def _kernel(config: Config) -> Shapes:
    hidden = config["hidden_size"]
    shapes: Shapes = {"conv.conv.weight": (hidden, 1, config["conv_L_cache"])}
    return shapes | ({"conv.conv.bias": (hidden,)} if config.get("conv_bias") else {})


ROW = decoder(
    "lfm2",
    "Lfm2",
    mixed_shapes(
        _kinds,
        {
            CONV: decoder_shapes(_convolution, norms=_NORMS, others=_kernel, final="embedding_norm"),
            FULL: decoder_shapes(
                _attention,
                norms=_NORMS,
                head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
                final="embedding_norm",
            ),
        },
    ),
    targets=(
        "conv.in_proj",
        "conv.out_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "feed_forward.w1",
        "feed_forward.w3",
        "feed_forward.w2",
    ),
    kinds={"conv": CONV, "self_attn": FULL},
    pieces=Pieces(
        ("embed_tokens",),
        "layers",
        ("embedding_norm",),
        writers=("conv.out_proj", "self_attn.out_proj", "feed_forward.w2"),
    ),
    config_overrides=Rotary(theta=1e6),
    tied=True,
    classifies=False,
    labels="",
    since=(4, 54),
    title="LFM 2",
    fields={
        "conv_L_cache": SIZE,
        **dict.fromkeys(("block_ff_dim", "block_multiple_of"), SIZE_OR_DEFAULT),
        "block_ffn_dim_multiplier": optional(ABOVE_0),
        **dict.fromkeys(("conv_bias", "block_auto_adjust_ff_dim"), SWITCH),
        "norm_eps": EPSILON,
        "full_attn_idxs": optional(many(whole(0))),
        "layer_types": kinds_field(CONV, FULL),
    },
    models="LFM 2 350M to 2.6B",
    remarks="short gated convolutions in most blocks, norms of queries and keys, tied head",
    tiny={
        "layer_types": [CONV, FULL, CONV],
        "conv_bias": True,
        "conv_L_cache": 4,
        "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.3,
        "rope_theta": 1000.0,
    },
)
