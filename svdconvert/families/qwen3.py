"""Qwen 3: a LLaMA with norms of queries and keys."""

from __future__ import annotations

from svdconvert.families.decoder import biased_by_config, decoder, decoder_shapes
from svdconvert.families.values import SIZE_OR_DEFAULT, SWITCH

ROW = decoder(
    "qwen3",
    "Qwen3",
    decoder_shapes(biased_by_config, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    since=(4, 51),
    fields={"use_sliding_window": SWITCH, "max_window_layers": SIZE_OR_DEFAULT},
    models="Qwen 3",
    remarks="norms of queries and keys",
    tiny={"head_dim": 32, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    # it does not read the window
    llama_cpp={"use_sliding_window": False},
)
