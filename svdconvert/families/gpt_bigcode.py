"""GPT-BigCode: GPT-2 with one head of keys and values for all queries, and linear layers stored as usual."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import BLOCKS, EPSILON, FACTOR, SIZE, SIZE_OR_DEFAULT, SWITCH
from svdconvert.fields import TEXT, optional


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    keys = hidden // config["n_head"] if config.get("multi_query", True) else hidden
    shapes: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (hidden,)
        for name, out, inp in (
            ("attn.c_attn", hidden + 2 * keys, hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", inner, hidden),
            ("mlp.c_proj", hidden, inner),
        ):
            shapes[f"{block}{name}.weight"], shapes[f"{block}{name}.bias"] = (out, inp), (out,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="gpt_bigcode",
    stock="GPTBigCode",
    factored="GPTBigCodeSVD",
    svd_model_type="gpt_bigcode_svd",
    prefix="transformer.",
    targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    shapes=_shapes,
    config_overrides=lambda config: {},
    pieces=Pieces(("wte", "wpe"), "h", ("ln_f",), writers=("attn.c_proj", "mlp.c_proj")),
    dropped=("transformer.bias", "*.attn.bias", "*.attn.masked_bias"),
    tied=True,
    labels="classifier",
    fields={
        **dict.fromkeys(("n_embd", "n_head", "n_positions"), SIZE),
        "n_layer": BLOCKS,
        "n_inner": SIZE_OR_DEFAULT,
        "layer_norm_epsilon": EPSILON,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), FACTOR),
        **dict.fromkeys(("multi_query", "scale_attn_weights"), SWITCH),
        "activation_function": optional(TEXT),
    },
    filled="c_proj",
    title="GPT-BigCode",
    models="StarCoder, SantaCoder",
    remarks="one head of keys and values, in one with the queries, learned positions, tied head",
    tiny={"n_inner": 128, "intermediate_size": None, "num_key_value_heads": None},
)
