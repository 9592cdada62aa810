"""What polyglot-ko's real sizes hold in memory while they train: counted on the meta device, no weights needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from examples.dialogue.memory import Memory

# hidden, layers, heads, rotary_pct; the rank is a quarter of the hidden size, as in the paper.
SIZES: Mapping[str, tuple[int, int, int, float]] = {
    "1.3B": (2048, 24, 16, 0.5),
    "3.8B": (3072, 32, 24, 0.5),
    "5.8B": (4096, 28, 16, 0.25),
    "12.8B": (5120, 40, 40, 0.5),
}
VOCABULARY = 30080
TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_LAYERS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

# nf4 with double quantisation (arXiv:2305.14314, section 3): 4 bits, an 8-bit constant for 64 weights, a 32-bit one for
# 256 of those.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@dataclass(frozen=True)
class Way:
    """A way to fine-tune.

    Attributes:
        name: as tables call it.
        factored: whether the layers are factored at a quarter of the hidden size.
        adapter: LoRA of rank 32 beside the four targets; otherwise everything trains.
        quantized: whether the linear layers of the blocks are in nf4.
    """

    name: str
    factored: bool
    adapter: bool
    quantized: bool


WAYS = (
    Way("all weights", False, False, False),
    Way("all weights, factored (-S)", True, False, False),
    Way("LoRA", False, True, False),
    Way("LoRA, factored (-S-L)", True, True, False),
    Way("QLoRA", False, True, True),
    Way("QLoRA, factored", True, True, True),
)


@functools.cache
def standing_memory(size: str, way: Way) -> Memory:
    """Weights, gradients and AdamW state of a fine-tuning, without activations.

    Trained weights are float32 masters. Frozen ones are in 16 bits; under QLoRA in nf4, and what is no linear layer of
    a block in float32, as peft's ``prepare_model_for_kbit_training`` leaves it.

    Args:
        size: row of :data:`SIZES`.
        way: row of :data:`WAYS`.
    """
    import torch
    from svdconvert.modeling.modeling_polyglot_svd import PolyglotSVDConfig, PolyglotSVDForCausalLM
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    hidden, layers, heads, rotary = SIZES[size]
    geometry = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "rotary_pct": rotary,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        if way.factored:
            ranks = {f"layers.{n}.{name}": hidden // 4 for n in range(layers) for name in _LAYERS}
            model: torch.nn.Module = PolyglotSVDForCausalLM(PolyglotSVDConfig(**geometry, svd_ranks=ranks))
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**geometry))
    total = sum(p.numel() for p in model.parameters())
    linear = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    if not way.adapter:
        return Memory(total, total, 4 * total, 4 * total, 8 * total)
    sides = (hidden + 3 * hidden) + (hidden + hidden) + 2 * (hidden + 4 * hidden)
    trainable = layers * 32 * sides
    frozen = int(linear * NF4_BITS / 8) + 4 * (total - linear) if way.quantized else 2 * total
    return Memory(total + trainable, trainable, frozen + 4 * trainable, 4 * trainable, 8 * trainable)
