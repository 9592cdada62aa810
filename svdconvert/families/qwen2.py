"""Qwen 1.5 to 2.5: a LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from svdconvert.families.decoder import decoder, decoder_shapes, separate
from svdconvert.families.values import SIZE_OR_DEFAULT, SWITCH

ROW = decoder(
    "qwen2",
    "Qwen2",
    decoder_shapes(lambda config: separate(config, qkv_bias=True)),
    fields={"use_sliding_window": SWITCH, "max_window_layers": SIZE_OR_DEFAULT},
    models="Qwen 1.5, 2, 2.5",
    remarks="biases on q, k, v; tied head in small ones",
    tiny={"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    # it does not read the window
    llama_cpp={"use_sliding_window": False},
)
