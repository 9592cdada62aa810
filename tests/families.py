"""A tiny random model of every family of the architecture table, in the form in which stock transformers saves it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from checkpoints import write_tokenizer

from svdconvert.architectures import ARCHITECTURES

VOCAB = 160
FAMILIES = list(ARCHITECTURES)
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def write_family(folder: Path, model_type: str) -> Path:
    """Save the tiny model as its stock class does, with a tokenizer beside it."""
    cls = getattr(transformers, ARCHITECTURES[model_type].dense_class)
    torch.manual_seed(0)
    model = cls(cls.config_class(**COMMON))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
