"""Falcon: queries, keys and values in one, with few heads of keys; attention and MLP side by side in most."""

from __future__ import annotations

from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import EPSILON, FACTOR, SIZE_OR_DEFAULT, SWITCH
from svdconvert.fields import TEXT, optional


def _hidden(config: Config) -> int:
    """Channels of the residual stream; the first checkpoints have another name for them, which comes first."""
    named = config.get("n_embed")
    return int(config["hidden_size"] if named is None else named)


def _said(config: Config, name: str, default: bool) -> bool:
    value = config.get(name)
    return default if value is None else bool(value)


def _norms(config: Config) -> tuple[str, ...]:
    """Those of a block, by its architecture: that of 40B, that of 7B, or one part after the other."""
    if not _said(config, "parallel_attn", True):
        return ("input_layernorm", "post_attention_layernorm")
    two = 2 if _said(config, "new_decoder_architecture", False) else 1
    return ("ln_attn", "ln_mlp") if (config.get("num_ln_in_parallel_attn") or two) == 2 else ("input_layernorm",)


def _shapes(config: Config) -> Shapes:
    hidden, vocab, heads = _hidden(config), config["vocab_size"], config["num_attention_heads"]
    inner, groups = config.get("ffn_hidden_size") or 4 * hidden, heads
    if _said(config, "new_decoder_architecture", False):
        groups = config.get("num_kv_heads") or heads
    elif _said(config, "multi_query", True):
        groups = 1
    fused = hidden // heads * (heads + 2 * groups)
    shapes: Shapes = {"transformer.word_embeddings.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}."
        for norm in _norms(config):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (hidden,)
        for name, out, inp in (
            ("self_attention.query_key_value", fused, hidden),
            ("self_attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", inner, hidden),
            ("mlp.dense_4h_to_h", hidden, inner),
        ):
            shapes[f"{block}{name}.weight"] = (out, inp)
            if config.get("bias"):
                shapes[f"{block}{name}.bias"] = (out,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="falcon",
    stock="Falcon",
    factored="FalconSVD",
    svd_model_type="falcon_svd",
    prefix="transformer.",
    targets=("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    shapes=_shapes,
    config_overrides=Rotary(),
    pieces=Pieces(("word_embeddings",), "h", ("ln_f",), writers=("self_attention.dense", "mlp.dense_4h_to_h")),
    dropped=("*.rotary_emb.inv_freq",),
    tied=True,
    labels="classifier",
    fields={
        **dict.fromkeys(("n_embed", "num_kv_heads", "ffn_hidden_size", "num_ln_in_parallel_attn"), SIZE_OR_DEFAULT),
        "layer_norm_epsilon": EPSILON,
        "hidden_dropout": FACTOR,
        **dict.fromkeys(("new_decoder_architecture", "multi_query", "parallel_attn", "alibi", "bias"), SWITCH),
        "activation": optional(TEXT),
    },
    models="Falcon 7B, 11B, 40B, 180B, Falcon RW",
    remarks="parallel attention and MLP, q, k and v in one with few heads of keys, tied head",
    copies_keys=lambda config: _said(config, "new_decoder_architecture", False),
    tiny={
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 128,
        "rope_theta": 1000.0,
        **dict.fromkeys(("intermediate_size", "num_key_value_heads")),
    },
)
