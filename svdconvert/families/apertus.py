"""Apertus: norms of queries and keys, and an MLP without a gate whose activation, xIELU, is trained."""

from __future__ import annotations

from svdconvert.families.decoder import UNGATED, Linears, decoder, decoder_shapes, ungated
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Config, Shapes


def _linears(config: Config) -> Linears:
    return ungated(config, attention_bias=bool(config.get("attention_bias")))


def _activation(config: Config) -> Shapes:
    """Two parameters, and two constants that are stored beside them."""
    if config.get("hidden_act", "xielu") != "xielu":
        return {}
    return {f"mlp.act_fn.{name}": shape for name, shape in _XIELU.items()}


_XIELU: Shapes = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

ROW = decoder(
    "apertus",
    "Apertus",
    decoder_shapes(
        _linears,
        norms=("attention_layernorm", "feedforward_layernorm"),
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        others=_activation,
    ),
    targets=UNGATED,
    config_overrides=Rotary(theta=12000000.0, scaling=_SCALING),
    classifies=False,
    since=(4, 56),
    models="Apertus 8B, 70B",
    remarks="no gate, xIELU with parameters of its own in each block, norms of queries and keys",
    tiny={
        "attention_bias": True,
        "rope_theta": 1000.0,
        "rope_scaling": {**_SCALING, "original_max_position_embeddings": 16},
    },
)
