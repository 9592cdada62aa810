"""Tiny random models that see, of every row of the table of them, and what they are called with."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from support.checkpoints import write_tokenizer
from support.families import COMMON, VERSION
from svdconvert.families.tower import Tower
from svdconvert.families.towers import TOWERS

# Those that this version of transformers has.
SEEN = [tower for tower in TOWERS if tower.since <= VERSION]

VIDEO, START, IMAGE = 157, 158, 159
_WORDS = torch.randint(4, 150, (2, 12), generator=torch.Generator().manual_seed(0))
_PICTURES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
_PATCHES = torch.randn(2 * 16, 3 * 2 * 7 * 7, generator=torch.Generator().manual_seed(1))
_GRID = torch.tensor([[1, 4, 4]] * 2)

_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SQUARE = {**_TRANSFORMER, "image_size": 28, "patch_size": 7}
_QWEN: dict[str, Any] = {
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 7,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": COMMON["hidden_size"],
    },
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
}


def _with_vision(**changes: Any) -> dict[str, Any]:
    return {**_QWEN, "vision_config": {**_QWEN["vision_config"], **changes}}


# Every image is 4 tokens.
_WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": _SQUARE, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
    "mistral3": {
        "vision_config": {**_SQUARE, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "llava": {
        "vision_config": {**_SQUARE, "model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 32},
        "image_token_index": IMAGE,
    },
    "qwen2_5_vl": _with_vision(window_size=28, fullatt_block_indexes=[1]),
    "qwen3_vl": _with_vision(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
    "qwen2_vl": _with_vision(embed_dim=32, hidden_size=COMMON["hidden_size"], mlp_ratio=2),
}


def settings(tower: Tower) -> dict[str, Any]:
    """config.json of the tiny model, as far as it differs from its class's defaults."""
    text = {**COMMON, **tower.text.tiny, **tower.tiny, "model_type": tower.language_types[0]}
    text = {name: value for name, value in text.items() if value is not None}
    return json.loads(json.dumps({**_WHOLE[tower.model_type], "text_config": text}))


def stock(tower: Tower) -> Any:
    """The tiny model in float32, with weights of which every single one matters."""
    config = getattr(transformers, f"{tower.stock}Config")(**settings(tower))
    model = getattr(transformers, tower.dense_class)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.tie_weights()
    return model


def write(folder: Path, tower: Tower) -> Any:
    """Save the tiny model, with a tokenizer and a file of its processor beside it."""
    model = stock(tower)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    return model


def words() -> dict[str, Tensor]:
    """What a model is called with that reads a text."""
    return {"input_ids": _WORDS}


def pictures(model: Any) -> dict[str, Tensor]:
    """What a model is called with that reads two texts with an image in each."""
    ids = _WORDS.clone()
    ids[:, 1], ids[:, 2:6] = START, IMAGE
    known = inspect.signature(type(model).forward).parameters
    kind = model.config.model_type
    given: dict[str, Tensor] = {"input_ids": ids, "pixel_values": _PICTURES}
    if "image_grid_thw" in known:
        given |= {"pixel_values": _PATCHES, "image_grid_thw": _GRID}
    if kind.startswith("mistral3"):
        given["image_sizes"] = torch.tensor([[28, 28]] * 2)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in known:
            given[name] = (ids == IMAGE).long()
    return given


def both(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of a text, and of one with an image."""
    with torch.no_grad():
        return model(**words()).logits, model(**pictures(model)).logits


def load(folder: Path, auto: Any = transformers.AutoModelForImageTextToText) -> Any:
    """The model of a folder, all of whose tensors were used and there."""
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    left = [name for name in info["unexpected_keys"] if not name.endswith("lm_head.weight")]
    assert not (left if auto is transformers.AutoModel else info["unexpected_keys"])
    return model.eval()
