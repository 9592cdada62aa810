"""GPT-J: attention and MLP side by side, neighbouring channels rotated, a bias on the head."""

from __future__ import annotations

from svdconvert.families.row import Architecture, Config, Pieces, Shapes
from svdconvert.families.values import BLOCKS, EPSILON, FACTOR, SIZE, SIZE_OR_DEFAULT
from svdconvert.fields import TEXT, optional


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden)}
    for layer in range(config["n_layer"]):
        block = f"transformer.h.{layer}."
        shapes[f"{block}ln_1.weight"] = shapes[f"{block}ln_1.bias"] = (hidden,)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{block}attn.{name}.weight"] = (hidden, hidden)
        for name, out, inp in (("mlp.fc_in", inner, hidden), ("mlp.fc_out", hidden, inner)):
            shapes[f"{block}{name}.weight"], shapes[f"{block}{name}.bias"] = (out, inp), (out,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (hidden,)
    shapes["lm_head.weight"], shapes["lm_head.bias"] = (vocab, hidden), (vocab,)
    return shapes


ROW = Architecture(
    model_type="gptj",
    stock="GPTJ",
    factored="GPTJSVD",
    svd_model_type="gptj_svd",
    prefix="transformer.",
    targets=("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    shapes=_shapes,
    config_overrides=lambda config: {},
    pieces=Pieces(("wte",), "h", ("ln_f",), writers=("attn.out_proj", "mlp.fc_out")),
    dropped=("*.attn.bias", "*.attn.masked_bias"),
    head_bias=True,
    labels="",
    fields={
        **dict.fromkeys(("n_embd", "n_head", "n_positions"), SIZE),
        "n_layer": BLOCKS,
        **dict.fromkeys(("n_inner", "rotary_dim"), SIZE_OR_DEFAULT),
        "layer_norm_epsilon": EPSILON,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), FACTOR),
        "activation_function": optional(TEXT),
    },
    asks_parallel=True,
    title="GPT-J",
    models="KoGPT, GPT-J 6B",
    remarks="parallel attention and MLP, no gate, a bias on the head too, neighbouring channels rotated, some of them",
    tiny={"n_inner": 128, "rotary_dim": 8, "intermediate_size": None, "num_key_value_heads": None},
)
