"""The sizes of LLaMA's relatives, where a block has seven projections and keys and values may have fewer heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Llama:
    """Sizes of a LLaMA model."""

    name: str
    hidden: int
    layers: int
    heads: int
    groups: int
    inner: int
    vocab: int = 32000

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module path within a layer -> [out, in]."""
        h, small = self.hidden, self.hidden // self.heads * self.groups
        attention = {"q_proj": (h, h), "k_proj": (small, h), "v_proj": (small, h), "o_proj": (h, h)}
        mlp = {"gate_proj": (self.inner, h), "up_proj": (self.inner, h), "down_proj": (h, self.inner)}
        found = {f"self_attn.{name}": shape for name, shape in attention.items()}
        return found | {f"mlp.{name}": shape for name, shape in mlp.items()}

    @property
    def config(self) -> dict[str, Any]:
        """Fields of ``LlamaConfig``."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "num_hidden_layers": self.layers,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocab,
        }


# TinyLlama 1.1B
LLAMAS = {llama.name: llama for llama in (Llama("llama-1.1b", 2048, 22, 32, 4, 5632),)}
