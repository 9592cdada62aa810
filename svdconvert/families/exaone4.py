"""EXAONE 4: norms after attention and MLP, norms of queries and keys, and windows in most blocks."""

from __future__ import annotations

from dataclasses import replace

from svdconvert.families.decoder import PIECES, POST_NORMS, decoder, decoder_shapes, separate
from svdconvert.families.values import whole
from svdconvert.fields import TEXT, either, optional

ROW = decoder(
    "exaone4",
    "Exaone4",
    decoder_shapes(separate, norms=POST_NORMS, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    # a norm comes between a block's layers and the sum
    pieces=replace(PIECES, writers=()),
    since=(4, 54),
    fields={"sliding_window_pattern": optional(either(TEXT, whole(0)))},
    title="EXAONE 4",
    models="EXAONE 4",
    remarks="norms after attention and MLP, norms of queries and keys, windows in three of four blocks",
    tiny={"sliding_window": 7, "sliding_window_pattern": 2, "rope_theta": 1000.0},
)
