"""GPT-NeoX: Polyglot-Ko, Pythia."""

from __future__ import annotations

from svdconvert.families import rotary
from svdconvert.families.row import Architecture, Config, Fused, Pieces, Shapes
from svdconvert.families.values import DIVISOR, FACTOR, SWITCH


def _shapes(config: Config) -> Shapes:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: Shapes = {"gpt_neox.embed_in.weight": (vocab, hidden)}
    attention_bias = config.get("attention_bias", True)
    for layer in range(config["num_hidden_layers"]):
        block = f"gpt_neox.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (hidden,)
        for name, out, inp, bias in (
            ("attention.query_key_value", 3 * hidden, hidden, attention_bias),
            ("attention.dense", hidden, hidden, attention_bias),
            ("mlp.dense_h_to_4h", inner, hidden, True),
            ("mlp.dense_4h_to_h", hidden, inner, True),
        ):
            shapes[f"{block}{name}.weight"] = (out, inp)
            if bias:
                shapes[f"{block}{name}.bias"] = (out,)
    shapes["gpt_neox.final_layer_norm.weight"] = shapes["gpt_neox.final_layer_norm.bias"] = (hidden,)
    shapes["embed_out.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="gpt_neox",
    stock="GPTNeoX",
    factored="PolyglotSVD",
    svd_model_type="polyglot_svd",
    prefix="gpt_neox.",
    targets=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    shapes=_shapes,
    config_overrides=rotary.gpt_neox,
    pieces=Pieces(("embed_in",), "layers", ("final_layer_norm",), writers=("attention.dense", "mlp.dense_4h_to_h")),
    # transformers renamed the head in memory (embed_out to lm_head, 5.14) and renames stock checkpoints while loading,
    # but not those of custom classes; so factored checkpoints always say lm_head.
    head=("embed_out.weight", "lm_head.weight"),
    labels="classifier",
    dropped=("*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.inv_freq"),
    fused={"attention.query_key_value": Fused(lambda config: (config["hidden_size"],) * 3, by_head=True)},
    fields={"rotary_pct": FACTOR, "rotary_emb_base": DIVISOR, "use_parallel_residual": SWITCH},
    template="gpt_neox",
    title="GPT-NeoX (Polyglot-Ko)",
    models="Polyglot-Ko, Pythia, GPT-NeoX-20B",
    remarks="head under two names",
    tiny={"rotary_pct": 0.5, "num_key_value_heads": None},
    llama_cpp={},
)
