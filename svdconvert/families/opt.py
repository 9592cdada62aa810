"""OPT: learned positions, biases everywhere, blocks one level deeper than elsewhere."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import SIZE, SIZE_OR_DEFAULT, SWITCH
from svdconvert.fields import TEXT, optional


def _shapes(config: Config) -> Shapes:
    hidden, inner, vocab = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    embedded = config.get("word_embed_proj_dim") or hidden
    bias, affine = config.get("enable_bias", True), config.get("layer_norm_elementwise_affine", True)
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (vocab, embedded),
        # The first two positions are never used, an inheritance from fairseq.
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }

    def norm(name: str) -> None:
        if affine:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    if embedded != hidden:
        shapes["model.decoder.project_in.weight"] = (hidden, embedded)
        shapes["model.decoder.project_out.weight"] = (embedded, hidden)
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        norm("model.decoder.final_layer_norm")
    for layer in range(config["num_hidden_layers"]):
        block = f"model.decoder.layers.{layer}."
        norm(f"{block}self_attn_layer_norm")
        norm(f"{block}final_layer_norm")
        for name in ROW.targets:
            shape = {"fc1": (inner, hidden), "fc2": (hidden, inner)}.get(name, (hidden, hidden))
            shapes[f"{block}{name}.weight"] = shape
            if bias:
                shapes[f"{block}{name}.bias"] = shape[:1]
    shapes["lm_head.weight"] = (vocab, embedded)
    return shapes


ROW = Architecture(
    model_type="opt",
    stock="OPT",
    factored="OPTSVD",
    svd_model_type="opt_svd",
    prefix="model.",
    targets=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"),
    shapes=_shapes,
    config_overrides=lambda config: {},
    pieces=Pieces(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        "decoder.layers",
        ("decoder.final_layer_norm", "decoder.project_out"),
        writers=("self_attn.out_proj", "fc2"),
    ),
    dropped=("*decoder.version",),
    tied=True,
    labels="",
    fields={
        "ffn_dim": SIZE,
        "word_embed_proj_dim": SIZE_OR_DEFAULT,
        "enable_bias": SWITCH,
        "layer_norm_elementwise_affine": SWITCH,
        "do_layer_norm_before": SWITCH,
        "_remove_final_layer_norm": SWITCH,
        "activation_function": optional(TEXT),
    },
    head_width="word_embed_proj_dim",
    models="OPT",
    remarks="learned positions, projected embeddings (350m)",
    tiny={"ffn_dim": 128, "word_embed_proj_dim": 128, "intermediate_size": None, "num_key_value_heads": None},
)
