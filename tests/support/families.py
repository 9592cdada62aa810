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
# Those that this version of transformers has.
FAMILIES = [name for name, row in ARCHITECTURES.items() if row.since <= VERSION]


def stock_config(model_type: str, **changes: Any) -> Any:
    """Configuration of the tiny model; what is particular to its family is in its row."""
    row = ARCHITECTURES[model_type]
    settings = {**COMMON, **row.tiny, **changes}
    settings = {key: dict(v) if isinstance(v, dict) else v for key, v in settings.items() if v is not None}
    return getattr(transformers, f"{row.inner}Config")(**settings)


def stock_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """The tiny model in float32, with weights of which every single one matters to the logits."""
    row = ARCHITECTURES[model_type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # gpt-oss begins with sinks that are not constant
        model = getattr(transformers, row.dense_class)(stock_config(model_type, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    embeddings = tuple(f"{row.prefix}{name}." for name in row.pieces.embeddings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # 1 or 0 to begin with, as the family multiplies by it or by 1 more
                parameter.add_(0.1 * noise)
            elif name.startswith(embeddings):
                parameter.copy_(noise)
            else:
                fan_in = parameter.shape[0 if row.transposed and "lm_head" not in name else -1]
                u, _, v = torch.linalg.svd(noise, full_matrices=False)
                spectrum = torch.arange(1, u.shape[-1] + 1).pow(-0.5)
                parameter.copy_((u * spectrum) @ v * 4 * math.sqrt(max(parameter.shape[-2:]) / fan_in))
        # of size 1 as the first block gets them, whatever the family multiplies them by
        first = model(input_ids=torch.arange(VOCAB)[None, :32], output_hidden_states=True).hidden_states[0]
        model.get_input_embeddings().weight.div_(first.std())
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


def read_matrices(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of experts one by one."""
    from svdconvert.storage.reader import WeightReader
    from svdconvert.storage.source import LocalSource

    source = LocalSource(folder)
    with WeightReader(source) as reader:
        return {
            name: reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
            for name, info in source.tensors.items()
        }


def full_ranks(row: Architecture, folder: Path) -> dict[str, int]:
    """The rank of each target at which nothing is lost."""
    from svdconvert.planning.targets import choose_targets
    from svdconvert.storage.source import LocalSource

    return {target.module: min(target.shape) for target in choose_targets(LocalSource(folder).tensors, row, ())}
