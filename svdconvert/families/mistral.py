"""Mistral: a LLaMA with a sliding window."""

from __future__ import annotations

from svdconvert.families.decoder import decoder, decoder_shapes, separate

ROW = decoder(
    "mistral",
    "Mistral",
    decoder_shapes(separate),
    models="Mistral 7B",
    remarks="sliding window",
    tiny={"rope_theta": 1000.0, "sliding_window": 7, "head_dim": 32},
    # it does not read the window
    llama_cpp={"sliding_window": None},
)
