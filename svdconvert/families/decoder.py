"""What LLaMA and its descendants share: rotary positions, RMS norms, a gated MLP, mostly grouped-query attention.

Each has a file of its own, with a row made by :func:`decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Architecture, Config, Pieces, Shapes

TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
UNGATED = tuple(name for name in TARGETS if name != "mlp.gate_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
PIECES = Pieces(("embed_tokens",), "layers", ("norm",), writers=("self_attn.o_proj", "mlp.down_proj"))

POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

# name of a linear layer -> ((out, in), whether it has a bias)
Linears = Mapping[str, tuple[tuple[int, int], bool]]


def head_size(config: Config) -> int:
    """Channels of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def widths(config: Config) -> tuple[int, int, int, int]:
    """Channels of the residual stream, of the queries, of the keys (or values), and of the MLP."""
    heads = config["num_attention_heads"]
    size = head_size(config)
    groups = config.get("num_key_value_heads") or heads
    return config["hidden_size"], heads * size, groups * size, config["intermediate_size"]


def separate(config: Config, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False) -> Linears:
    """A block's seven linear layers."""
    hidden, queries, keys, inner = widths(config)
    return {
        "self_attn.q_proj": ((queries, hidden), qkv_bias),
        "self_attn.k_proj": ((keys, hidden), qkv_bias),
        "self_attn.v_proj": ((keys, hidden), qkv_bias),
        "self_attn.o_proj": ((hidden, queries), o_bias),
        "mlp.gate_proj": ((inner, hidden), mlp_bias),
        "mlp.up_proj": ((inner, hidden), mlp_bias),
        "mlp.down_proj": ((hidden, inner), mlp_bias),
    }


def ungated(config: Config, *, attention_bias: bool = False, mlp_bias: bool = False) -> Linears:
    """Those of a block whose MLP has no gate."""
    linears = separate(config, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)
    return {name: linear for name, linear in linears.items() if name != "mlp.gate_proj"}


def ungated_biased_by_config(config: Config) -> Linears:
    """The same with biases where ``attention_bias`` and ``mlp_bias`` say so."""
    return ungated(config, attention_bias=bool(config.get("attention_bias")), mlp_bias=bool(config.get("mlp_bias")))


def attention_biased_by_config(config: Config) -> Linears:
    """The seven with biases of attention alone, where ``attention_bias`` says so."""
    attention = bool(config.get("attention_bias"))
    return separate(config, qkv_bias=attention, o_bias=attention)


def wide_head_norms(config: Config) -> Shapes:
    """RMS norms of all queries and of all keys, over all of their channels at once."""
    _, queries, keys, _ = widths(config)
    return {"self_attn.q_norm.weight": (queries,), "self_attn.k_norm.weight": (keys,)}


def biased_by_config(config: Config) -> Linears:
    """The same with biases where ``attention_bias`` and ``mlp_bias`` say so."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return separate(config, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)


def decoder_shapes(
    linears: Callable[[Config], Linears],
    *,
    norms: tuple[str, ...] = NORMS,
    head_norms: tuple[str, ...] = (),
    norm_biases: bool = False,
    others: Callable[[Config], Shapes] = lambda config: {},
    final: str = "norm",
    head_bias: bool = False,
) -> Callable[[Config], Shapes]:
    """Shapes of a family from those of a block's linear layers.

    Args:
        linears: config -> a block's linear layers.
        norms: norms of a block, over the residual stream.
        head_norms: RMS norms of a block, over the channels of one head.
        norm_biases: whether the norms over the residual stream are layer norms, with biases, instead of RMS norms.
        others: config -> what else a block has, by its names in the block.
        final: the norm after the last block; empty if it has no weight.
        head_bias: whether the head has a bias.
    """

    kinds = ("weight", "bias") if norm_biases else ("weight",)

    def shapes(config: Config) -> Shapes:
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
        for layer in range(config["num_hidden_layers"]):
            block = f"model.layers.{layer}."
            found |= {f"{block}{norm}.{kind}": (hidden,) for norm in norms for kind in kinds}
            found |= {f"{block}{norm}.weight": (head_size(config),) for norm in head_norms}
            found |= {f"{block}{name}": shape for name, shape in others(config).items()}
            for name, (shape, bias) in linears(config).items():
                found[f"{block}{name}.weight"] = shape
                if bias:
                    found[f"{block}{name}.bias"] = shape[:1]
        found |= {f"model.{final}.{kind}": (hidden,) for kind in kinds if final}
        found["lm_head.weight"] = (vocab, hidden)
        if head_bias:
            found["lm_head.bias"] = (vocab,)
        return found

    return shapes


def decoder(model_type: str, stock: str, shapes: Callable[[Config], Shapes], **particular: Any) -> Architecture:
    """The row of a relative of LLaMA.

    Args:
        model_type, stock, shapes: fields of the row.
        particular: its other fields, where they differ from LLaMA's.
    """
    usual: dict[str, Any] = {
        "targets": TARGETS,
        "config_overrides": Rotary(),
        "pieces": PIECES,
        "dropped": ("*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    }
    return Architecture(
        model_type=model_type,
        stock=stock,
        factored=f"{stock}SVD",
        svd_model_type=f"{model_type}_svd",
        prefix="model.",
        shapes=shapes,
        **usual | particular,
    )
