"""A tiny random model of every family of the architecture table, in the form in which stock transformers saves it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from support.checkpoints import write_tokenizer
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCAB = 160

# What every decoder has, under the names that most give it. Grouped-query attention where there is such a thing.
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
# What is particular to a family is set to something that shows: windows shorter than the test's sequences, soft caps
# that cap, scalings that scale, another base of the rotary frequencies.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + 0.2 * n for n in range(8)],
}
PARTICULAR: Mapping[str, Mapping[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": None},
    "llama": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"rope_theta": 1000.0, "sliding_window": 7, "head_dim": 32},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 7,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "phi3": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 128, "intermediate_size": None, "num_key_value_heads": None},
    "gpt2": {"n_inner": 128, "intermediate_size": None, "num_key_value_heads": None},
}
FAMILIES = [name for name in ARCHITECTURES if hasattr(transformers, f"{ARCHITECTURES[name].stock}Config")]


def stock_config(model_type: str, **changes: Any) -> Any:
    """Configuration of the tiny model; a family without anything particular to it needs no entry above."""
    settings = dict(COMMON) | dict(PARTICULAR.get(model_type, {})) | changes
    cls = getattr(transformers, f"{ARCHITECTURES[model_type].stock}Config")
    settings = {key: dict(v) if isinstance(v, dict) else v for key, v in settings.items() if v is not None}
    return cls(**settings)


def stock_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny model in float32, with weights of which every single one matters to the logits."""
    row = ARCHITECTURES[model_type]
    config = stock_config(model_type, **changes)
    model = getattr(transformers, row.dense_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if model_type == "gemma2" else 1.0  # of the weights of norms
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(
                    0.1 * noise + (centre if "norm" in name or "ln_" in name else 0) * name.endswith("weight")
                )
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise / (8 if model_type == "gemma2" else 1))
            else:
                fan_in = parameter.shape[0 if row.transposed and "lm_head" not in name else 1]
                u, _, v = torch.linalg.svd(noise, full_matrices=False)
                spectrum = torch.arange(1, u.shape[1] + 1).pow(-0.5)
                parameter.copy_((u * spectrum) @ v * 4 * math.sqrt(max(parameter.shape) / fan_in))
    model.tie_weights()
    return model


def write_family(
    folder: Path, model_type: str, *, max_shard_size: str = "5GB", generation: bool | None = None, **changes: Any
) -> Path:
    """Save the tiny model as its stock class does, with a tokenizer beside it.

    Args:
        folder: where to.
        model_type: its family.
        max_shard_size: limit of a weight file.
        generation: whether there is a generation_config.json; by default every second family has one.
        changes: to its configuration.
    """
    model = stock_model(model_type, **changes)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=3, bos_token_id=0)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    if not (FAMILIES.index(model_type) % 2 if generation is None else generation):
        (folder / "generation_config.json").unlink()
    return folder


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def full_ranks(row: Architecture, folder: Path) -> dict[str, int]:
    """The rank of each target at which nothing is lost."""
    from svdconvert.planning.targets import choose_targets
    from svdconvert.storage.source import LocalSource

    return {target.module: min(target.shape) for target in choose_targets(LocalSource(folder).tensors, row, ())}
