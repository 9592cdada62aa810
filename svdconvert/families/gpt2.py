"""GPT-2: learned positions, and linear layers stored as [in, out] (Conv1D)."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Fused, Pieces, Shapes
from svdconvert.families.values import BLOCKS, EPSILON, SIZE, SIZE_OR_DEFAULT
from svdconvert.fields import TEXT, optional


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    shapes: Shapes = {
        "transformer.wte.weight": (vocab, hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (hidden,)
        for name, inp, out in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            shapes[f"{block}{name}.weight"], shapes[f"{block}{name}.bias"] = (inp, out), (out,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


ROW = Architecture(
    model_type="gpt2",
    stock="GPT2",
    factored="GPT2SVD",
    svd_model_type="gpt2_svd",
    prefix="transformer.",
    targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    shapes=_shapes,
    pieces=Pieces(("wte", "wpe"), "h", ("ln_f",), writers=("attn.c_proj", "mlp.c_proj")),
    # A field of old that transformers has given up and llama.cpp's converter still reads.
    config_overrides=lambda config: {"n_ctx": config.get("n_positions", 1024)},
    dropped=("*.attn.bias", "*.attn.masked_bias"),
    tied=True,
    transposed=True,
    asks_parallel=True,
    labels="classifier",
    causal="LMHeadModel",
    fused={"attn.c_attn": Fused(lambda config: (config["n_embd"],) * 3)},
    fields={
        **dict.fromkeys(("n_embd", "n_head", "n_positions"), SIZE),
        "n_layer": BLOCKS,
        "n_inner": SIZE_OR_DEFAULT,
        "layer_norm_epsilon": EPSILON,
        "activation_function": optional(TEXT),
    },
    title="GPT-2",
    models="GPT-2 and its fine-tuned forms",
    remarks="weights stored as [in, out]",
    tiny={"n_inner": 128, "intermediate_size": None, "num_key_value_heads": None},
    # its converter takes the inner width for 4 times the outer one
    llama_cpp={"n_inner": None},
)
