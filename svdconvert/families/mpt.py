"""MPT: a bias by distance (ALiBi) in the place of positions, norms and linear layers without biases."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import BLOCKS, EPSILON, SIZE, SWITCH
from svdconvert.fields import OBJECT, optional


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["d_model"], config["vocab_size"]
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}."
        shapes |= {f"{block}norm_1.weight": (hidden,), f"{block}norm_2.weight": (hidden,)}
        # 4 times as wide whatever expansion_ratio says, in the stock model too
        shapes |= {
            f"{block}attn.Wqkv.weight": (3 * hidden, hidden),
            f"{block}attn.out_proj.weight": (hidden, hidden),
            f"{block}ffn.up_proj.weight": (4 * hidden, hidden),
            f"{block}ffn.down_proj.weight": (hidden, 4 * hidden),
        }
    shapes["transformer.norm_f.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="mpt",
    stock="Mpt",
    factored="MptSVD",
    svd_model_type="mpt_svd",
    prefix="transformer.",
    targets=("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
    shapes=_shapes,
    config_overrides=lambda config: {},
    pieces=Pieces(("wte",), "blocks", ("norm_f",), writers=("attn.out_proj", "ffn.down_proj")),
    tied=True,
    labels="classifier",
    fields={
        **dict.fromkeys(("d_model", "n_heads", "max_seq_len"), SIZE),
        "n_layers": BLOCKS,
        "layer_norm_epsilon": EPSILON,
        "attn_config": optional(OBJECT),
        **dict.fromkeys(("no_bias", "learned_pos_emb"), SWITCH),
    },
    title="MPT",
    models="MPT 7B, MPT 30B",
    remarks="a bias by distance for positions, no biases, clipped q, k and v in one, tied head",
    tiny={
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 2.0},
        **dict.fromkeys(("intermediate_size", "num_key_value_heads", "max_position_embeddings")),
    },
)
