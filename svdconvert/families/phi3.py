"""Phi-3: a LLaMA with queries, keys and values in one matrix, and both inputs of the gate in another."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, widths
from svdconvert.families.rotary import Phi3
from svdconvert.families.row import Config, Fused


def _linears(config: Config) -> Linears:
    hidden, queries, keys, inner = widths(config)
    return {
        "self_attn.qkv_proj": ((queries + 2 * keys, hidden), False),
        "self_attn.o_proj": ((hidden, queries), False),
        "mlp.gate_up_proj": ((2 * inner, hidden), False),
        "mlp.down_proj": ((hidden, inner), False),
    }


def _attention(config: Config) -> tuple[int, int, int]:
    """Outputs of the queries, the keys and the values."""
    _, queries, keys, _ = widths(config)
    return queries, keys, keys


_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + 0.2 * n for n in range(8)],
}

ROW = decoder(
    "phi3",
    "Phi3",
    decoder_shapes(_linears),
    targets=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    config_overrides=Phi3(fraction=1.0, three_fields=True),
    # not the gate: both of its inputs share their inner factor well (docs/fused.md)
    fused={"self_attn.qkv_proj": Fused(_attention)},
    title="Phi-3",
    labels_4="classifier",
    models="Phi-3, Phi-3.5 mini, Phi-4 mini",
    remarks="gate and up in one, longrope",
    tiny={"rope_scaling": _LONGROPE, "original_max_position_embeddings": 32},
    llama_cpp={},
)
