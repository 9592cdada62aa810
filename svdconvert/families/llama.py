"""LLaMA, and whatever has its architecture."""

from __future__ import annotations

from svdconvert.families.decoder import biased_by_config, decoder, decoder_shapes

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

ROW = decoder(
    "llama",
    "Llama",
    decoder_shapes(biased_by_config),
    title="LLaMA",
    models="LLaMA 1, 2, 3, and what has its architecture",
    remarks="rope scaling, biases if the config says so",
    tiny={"rope_theta": 500000.0, "rope_scaling": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    # it takes no biases
    llama_cpp={"attention_bias": False, "mlp_bias": False},
)
