"""The architectures of GGUF files that can be read: how names, values and settings become those of transformers.

llama.cpp's converter renames every tensor, and changes the values of some: LLaMA's queries and keys are in the order
of its own rotation, Gemma's norms have the 1 added that the model adds, GPT-2's matrices are [out, in]. One row per
architecture says how each is undone, and which of its settings are known. A setting that is not known may change what
the model computes, so a file that has one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Settings with the same meaning everywhere: key without the architecture -> field of config.json.
_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_ROTARY = {**_SIZES, "rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BLOCK = {**_ATTENTION, **_GATED, "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    **_ATTENTION,
    **_GATED,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture as GGUF files have it.

    Attributes:
        name: their ``general.architecture``.
        model_type: that of config.json, row of the architecture table.
        top: tensors outside the blocks, without ``.weight``: name in GGUF -> name in the checkpoint.
        block: tensors of a block, likewise, without the block.
        blocks: beginning of a block's names in the checkpoint, before its number.
        fields: settings: key without the architecture -> field of config.json.
        permuted: tensors of a block whose rows are in the order of llama.cpp's rotation.
        offset_norms: whether 1 has been added to the weights of norms.
        transposed: tensors of a block that are [out, in] where the checkpoint has [in, out].
    """

    name: str
    model_type: str
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    blocks: str = "model.layers."
    fields: Mapping[str, str] = field(default_factory=lambda: _ROTARY)
    permuted: tuple[str, ...] = ()
    offset_norms: bool = False
    transposed: tuple[str, ...] = ()

    def checkpoint_name(self, name: str) -> str | None:
        """Name in the checkpoint of a tensor of the file; None if the architecture has no such tensor."""
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if stem in self.top:
            return f"{self.top[stem]}.{kind}"
        number, part = _block(stem)
        return f"{self.blocks}{number}.{self.block[part]}.{kind}" if part in self.block else None

    def is_permuted(self, name: str) -> bool:
        """Whether a tensor's rows are in the order of llama.cpp's rotation."""
        return _block(name.rpartition(".")[0])[1] in self.permuted

    def is_offset(self, name: str) -> bool:
        """Whether 1 has to be taken from a tensor's values."""
        return self.offset_norms and name.endswith("norm.weight")

    def is_transposed(self, name: str) -> bool:
        """Whether a tensor is a matrix that the checkpoint has the other way round."""
        return name.endswith(".weight") and _block(name.rpartition(".")[0])[1] in self.transposed


def _block(stem: str) -> tuple[str, str]:
    """``(number, rest)`` of a name in a block; both empty for other names."""
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    return (match[1], match[2]) if match else ("", "")


_ROWS = (
    GgufArchitecture("llama", "llama", permuted=("attn_q", "attn_k")),
    GgufArchitecture("qwen2", "qwen2"),
    GgufArchitecture("qwen3", "qwen3", block={**_BLOCK, **_HEAD_NORMS}),
    GgufArchitecture(
        "gemma2",
        "gemma2",
        block=_FOUR_NORMS,
        fields={
            **_ROTARY,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        offset_norms=True,
    ),
    GgufArchitecture(
        "gemma3",
        "gemma3_text",
        block={**_FOUR_NORMS, **_HEAD_NORMS},
        fields={
            **_ROTARY,
            "attention.sliding_window": "sliding_window",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        offset_norms=True,
    ),
    GgufArchitecture(
        "phi3",
        "phi3",
        block={
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        fields={
            **_ROTARY,
            "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
    ),
    GgufArchitecture(
        "starcoder2",
        "starcoder2",
        block={
            **_ATTENTION,
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        fields={**_SIZES, "rope.freq_base": "rope_theta", "attention.layer_norm_epsilon": "norm_epsilon"},
    ),
    GgufArchitecture(
        "gpt2",
        "gpt2",
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        blocks="transformer.h.",
        fields={
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
)

GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = {row.name: row for row in _ROWS}
