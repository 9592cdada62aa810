"""BLOOM: a bias by distance (ALiBi) in the place of positions, and a norm of the embeddings."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import BLOCKS, EPSILON, FACTOR, SIZE, SIZE_OR_DEFAULT, SWITCH


def _hidden(config: Config) -> int:
    """Channels of the residual stream; the first checkpoints have another name for them, which comes first."""
    named = config.get("n_embed")
    return int(config["hidden_size"] if named is None else named)


def _shapes(config: Config) -> Shapes:
    hidden, vocab = _hidden(config), config["vocab_size"]
    blocks = config["n_layer"] if "n_layer" in config else config["num_hidden_layers"]
    shapes: Shapes = {"transformer.word_embeddings.weight": (vocab, hidden)}

    def norm(name: str) -> None:
        shapes[f"transformer.{name}.weight"] = shapes[f"transformer.{name}.bias"] = (hidden,)

    norm("word_embeddings_layernorm")
    for layer in range(blocks):
        norm(f"h.{layer}.input_layernorm")
        norm(f"h.{layer}.post_attention_layernorm")
        for name, out, inp in (
            ("self_attention.query_key_value", 3 * hidden, hidden),
            ("self_attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", 4 * hidden, hidden),
            ("mlp.dense_4h_to_h", hidden, 4 * hidden),
        ):
            linear = f"transformer.h.{layer}.{name}"
            shapes[f"{linear}.weight"], shapes[f"{linear}.bias"] = (out, inp), (out,)
    norm("ln_f")
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="bloom",
    stock="Bloom",
    factored="BloomSVD",
    svd_model_type="bloom_svd",
    prefix="transformer.",
    targets=("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    shapes=_shapes,
    config_overrides=lambda config: {"hidden_size": _hidden(config)},
    pieces=Pieces(
        ("word_embeddings", "word_embeddings_layernorm"),
        "h",
        ("ln_f",),
        writers=("self_attention.dense", "mlp.dense_4h_to_h"),
    ),
    tied=True,
    labels="classifier",
    fields={
        "n_embed": SIZE_OR_DEFAULT,
        "n_head": SIZE,
        "n_layer": BLOCKS,
        "layer_norm_epsilon": EPSILON,
        "hidden_dropout": FACTOR,
        "apply_residual_connection_post_layernorm": SWITCH,
        "slow_but_exact": SWITCH,
    },
    title="BLOOM",
    models="BLOOM, BLOOMZ",
    remarks="a bias by distance for positions, a norm of the embeddings, q, k and v in one by the head, tied head",
    tiny=dict.fromkeys(("intermediate_size", "num_key_value_heads", "max_position_embeddings")),
)
