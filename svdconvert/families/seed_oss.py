"""Seed-OSS: a LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from svdconvert.families.decoder import Linears, decoder, decoder_shapes, separate
from svdconvert.families.row import Config
from svdconvert.families.values import FACTOR, SWITCH


def _linears(config: Config) -> Linears:
    return separate(
        config,
        qkv_bias=bool(config.get("attention_bias", True)),
        o_bias=bool(config.get("attention_out_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )


ROW = decoder(
    "seed_oss",
    "SeedOss",
    decoder_shapes(_linears),
    since=(4, 56),
    fields={"attention_out_bias": SWITCH, "residual_dropout": FACTOR},
    title="Seed-OSS",
    models="Seed-OSS",
    remarks="biases on q, k, v",
    tiny={"head_dim": 32, "attention_out_bias": True, "rope_theta": 1000.0},
)
