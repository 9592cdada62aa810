"""HunYuan's dense models: a LLaMA with norms of queries and keys after their rotation."""

from __future__ import annotations

from svdconvert.families.decoder import attention_biased_by_config, decoder, decoder_shapes

ROW = decoder(
    "hunyuan_v1_dense",
    "HunYuanDenseV1",
    decoder_shapes(attention_biased_by_config, head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm")),
    labels="",
    since=(4, 56),
    title="HunYuan dense",
    models="HunYuan 0.5B to 7B",
    remarks="norms of queries and keys after their rotation, a rotary base of its own scaling",
    tiny={
        "head_dim": 32,
        "attention_bias": True,
        "rope_theta": 1000.0,
        "rope_scaling": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0},
    },
)
