"""LLaMA and its descendants: rotary positions, RMS norms, a gated MLP, and mostly grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from svdconvert.families import rotary
from svdconvert.families.row import Architecture, Config, Fused, Shapes

TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "post_attention_layernorm")

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


def biased_by_config(config: Config) -> Linears:
    """The same with biases where ``attention_bias`` and ``mlp_bias`` say so."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    return separate(config, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)


def _fused(config: Config) -> Linears:
    """Phi-3: queries, keys and values in one matrix, both inputs of the gate in another."""
    hidden, queries, keys, inner = widths(config)
    return {
        "self_attn.qkv_proj": ((queries + 2 * keys, hidden), False),
        "self_attn.o_proj": ((hidden, queries), False),
        "mlp.gate_up_proj": ((2 * inner, hidden), False),
        "mlp.down_proj": ((hidden, inner), False),
    }


def _attention(config: Config) -> tuple[int, int, int]:
    """Outputs of the queries, the keys and the values."""
    _, queries, keys, _ = widths(config)
    return queries, keys, keys


def decoder_shapes(
    linears: Callable[[Config], Linears],
    *,
    norms: tuple[str, ...] = NORMS,
    head_norms: tuple[str, ...] = (),
) -> Callable[[Config], Shapes]:
    """Shapes of a family from those of a block's linear layers.

    Args:
        linears: config -> a block's linear layers.
        norms: RMS norms of a block, over the residual stream.
        head_norms: RMS norms of a block, over the channels of one head.
    """

    def shapes(config: Config) -> Shapes:
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        found: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
        for layer in range(config["num_hidden_layers"]):
            block = f"model.layers.{layer}."
            found |= {f"{block}{norm}.weight": (hidden,) for norm in norms}
            found |= {f"{block}{norm}.weight": (head_size(config),) for norm in head_norms}
            for name, (shape, bias) in linears(config).items():
                found[f"{block}{name}.weight"] = shape
                if bias:
                    found[f"{block}{name}.bias"] = shape[:1]
        found["model.norm.weight"] = (hidden,)
        found["lm_head.weight"] = (vocab, hidden)
        return found

    return shapes


LLAMA = Architecture(
    model_type="llama",
    stock="Llama",
    factored="LlamaSVD",
    svd_model_type="llama_svd",
    prefix="model.",
    targets=TARGETS,
    shapes=decoder_shapes(biased_by_config),
    config_overrides=rotary.both_spellings,
    dropped=("*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)


def _like_llama(model_type: str, stock: str, shapes: Callable[[Config], Shapes], **changes: Any) -> Architecture:
    return replace(
        LLAMA,
        model_type=model_type,
        stock=stock,
        factored=f"{stock}SVD",
        svd_model_type=f"{model_type}_svd",
        shapes=shapes,
        **changes,
    )


ROWS = (
    LLAMA,
    _like_llama("mistral", "Mistral", decoder_shapes(separate)),
    _like_llama("qwen2", "Qwen2", decoder_shapes(lambda config: separate(config, qkv_bias=True))),
    _like_llama(
        "qwen3", "Qwen3", decoder_shapes(biased_by_config, head_norms=("self_attn.q_norm", "self_attn.k_norm"))
    ),
    _like_llama(
        "gemma2",
        "Gemma2",
        decoder_shapes(biased_by_config, norms=(*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")),
        tied=True,
    ),
    _like_llama(
        "phi3",
        "Phi3",
        decoder_shapes(_fused),
        targets=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        config_overrides=rotary.phi3,
        # not the gate: both of its inputs share their inner factor well (docs/fused.md)
        fused={"self_attn.qkv_proj": Fused(_attention)},
    ),
    _like_llama("granite", "Granite", decoder_shapes(biased_by_config), classifies=False, labels=""),
)
