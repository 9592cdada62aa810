"""GPT-Neo: learned positions, products of queries and keys that are not scaled, windows in every second block."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import BLOCKS, EPSILON, FACTOR, SIZE
from svdconvert.fields import TEXT, optional


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    inner = config.get("intermediate_size") or 4 * hidden
    shapes: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (config["max_position_embeddings"], hidden),
    }
    for layer in range(config["num_layers"]):
        block = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (hidden,)
        for name, out, inp, bias in (
            ("attn.attention.q_proj", hidden, hidden, False),
            ("attn.attention.k_proj", hidden, hidden, False),
            ("attn.attention.v_proj", hidden, hidden, False),
            ("attn.attention.out_proj", hidden, hidden, True),
            ("mlp.c_fc", inner, hidden, True),
            ("mlp.c_proj", hidden, inner, True),
        ):
            shapes[f"{block}{name}.weight"] = (out, inp)
            if bias:
                shapes[f"{block}{name}.bias"] = (out,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="gpt_neo",
    stock="GPTNeo",
    factored="GPTNeoSVD",
    svd_model_type="gpt_neo_svd",
    prefix="transformer.",
    targets=(
        *(f"attn.attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        "mlp.c_fc",
        "mlp.c_proj",
    ),
    shapes=_shapes,
    config_overrides=lambda config: {},
    pieces=Pieces(("wte", "wpe"), "h", ("ln_f",), writers=("attn.attention.out_proj", "mlp.c_proj")),
    dropped=("*.attn.attention.bias", "*.attn.attention.masked_bias"),
    tied=True,
    labels="classifier",
    fields={
        **dict.fromkeys(("num_heads", "window_size"), SIZE),
        "num_layers": BLOCKS,
        "layer_norm_epsilon": EPSILON,
        **dict.fromkeys(("resid_dropout", "embed_dropout"), FACTOR),
        "activation_function": optional(TEXT),
    },
    title="GPT-Neo",
    models="GPT-Neo 125M to 2.7B",
    remarks="learned positions, windows in every second block, queries that are not scaled, tied head",
    # transformers 4.46 counts the blocks before it reads their number by its usual name
    tiny={
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "window_size": 7,
        "num_layers": 3,
        **dict.fromkeys(("num_hidden_layers", "num_key_value_heads")),
    },
)
