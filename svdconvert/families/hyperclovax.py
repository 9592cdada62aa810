"""HyperCLOVA X SEED: a LLaMA with scaled embeddings, residuals and logits, and two more norms in a block."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, biased_by_config, decoder, decoder_shapes
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import FACTOR, SWITCH


def _post_norms(config: Config) -> Shapes:
    after = config.get("use_post_norm", True)
    return {f"{name}.weight": (config["hidden_size"],) for name in ("post_norm1", "post_norm2")} if after else {}


ROW = decoder(
    "hyperclovax",
    "HyperCLOVAX",
    decoder_shapes(biased_by_config, others=_post_norms),
    # a norm and a factor come between a block's layers and the sum
    pieces=replace(PIECES, writers=(), logits="times logits_scaling"),
    classifies=False,
    labels="",
    since=(5, 10),
    fields={
        **dict.fromkeys(
            ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), FACTOR
        ),
        "use_post_norm": SWITCH,
    },
    title="HyperCLOVA X",
    models="HyperCLOVA X SEED",
    remarks="scaled embeddings, residuals and logits, two more norms in a block",
    tiny={
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 0.5,
        "rope_theta": 1000.0,
    },
)
