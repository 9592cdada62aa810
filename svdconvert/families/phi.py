"""Phi 1 to 2: attention and MLP side by side, biases everywhere, also on the head."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, head_size, widths
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Pieces, Shapes
from svdconvert.families.values import FACTOR, SWITCH


def _linears(config: Config) -> Linears:
    hidden, queries, keys, inner = widths(config)
    return {
        "self_attn.q_proj": ((queries, hidden), True),
        "self_attn.k_proj": ((keys, hidden), True),
        "self_attn.v_proj": ((keys, hidden), True),
        "self_attn.dense": ((hidden, queries), True),
        "mlp.fc1": ((inner, hidden), True),
        "mlp.fc2": ((hidden, inner), True),
    }


def _head_norms(config: Config) -> Shapes:
    names = ("q_layernorm", "k_layernorm") if config.get("qk_layernorm") else ()
    return {f"self_attn.{name}.{kind}": (head_size(config),) for name in names for kind in ("weight", "bias")}


ROW = decoder(
    "phi",
    "Phi",
    decoder_shapes(
        _linears,
        norms=("input_layernorm",),
        norm_biases=True,
        others=_head_norms,
        final="final_layernorm",
        head_bias=True,
    ),
    targets=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.dense",
        "mlp.fc1",
        "mlp.fc2",
    ),
    config_overrides=Rotary(fraction=0.5),
    pieces=Pieces(("embed_tokens",), "layers", ("final_layernorm",), writers=("self_attn.dense", "mlp.fc2")),
    head_bias=True,
    labels_4="classifier",
    fields={"qk_layernorm": SWITCH, "resid_pdrop": FACTOR, "embd_pdrop": FACTOR},
    models="Phi 1, 1.5, 2",
    remarks="parallel attention and MLP, no gate, biases on the head too, half of the channels rotated",
    # no norms of queries and keys, which transformers 4.46 cannot compute
    tiny={"rope_theta": 1000.0},
)
