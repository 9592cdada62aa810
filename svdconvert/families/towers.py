"""The models that see whose language model is converted: one row for each kind of language model in each. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families import gemma3_text, llama, ministral3, mistral, qwen2, qwen3
from svdconvert.families.row import Architecture, Config
from svdconvert.families.tower import Tower

_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_MISTRAL = {**_LLAMA, "intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4096}


def _beside_a_projector(**particular: Any) -> Tower:
    """A row of a model whose class builds its language model by its config: LLaVA and its relatives.

    Args:
        particular: its fields.
    """
    vision = ("vision_tower", "multi_modal_projector")
    usual: dict[str, Any] = {
        "prefixes": ("language_model.model.", "model.language_model."),
        "heads": ("language_model.lm_head.weight", "lm_head.weight"),
        "vision": vision,
        "renames": (
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            *((rf"^{name}\.", f"model.{name}.") for name in vision),
        ),
    }
    return Tower(**usual | particular)


def _qwen(text: Architecture, **particular: Any) -> Tower:
    """A row of a Qwen that sees.

    Args:
        text: the Qwen that its language model is.
        particular: its other fields.
    """
    usual: dict[str, Any] = {
        "prefixes": ("model.language_model.", "model."),
        "heads": ("lm_head.weight",),
        "vision": ("visual",),
        "renames": (
            (r"^visual", "model.visual"),
            (r"^model(?!\.(language_model|visual))", "model.language_model"),
        ),
        "flat": (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "vision_token_id",
        ),
    }
    return Tower(text=text, **usual | particular)


_QWEN2_VL = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
}

TOWERS: tuple[Tower, ...] = (
    _beside_a_projector(
        model_type="gemma3",
        stock="Gemma3",
        svd_model_type="gemma3_svd",
        text=gemma3_text.ROW,
        defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        since=gemma3_text.ROW.since,
        title="Gemma 3",
        models="Gemma 3 4B, 12B, 27B",
    ),
    _beside_a_projector(
        model_type="mistral3",
        stock="Mistral3",
        processor="PixtralProcessor",
        svd_model_type="mistral3_svd",
        text=mistral.ROW,
        defaults=_MISTRAL,
        title="Mistral 3",
        models="Mistral Small 3.1, 3.2, Magistral Small",
    ),
    _beside_a_projector(
        model_type="mistral3",
        stock="Mistral3",
        processor="PixtralProcessor",
        svd_model_type="mistral3_ministral3_svd",
        text=ministral3.ROW,
        since=ministral3.ROW.since,
        title="Mistral 3",
        models="Ministral 3, Devstral 2",
    ),
    _qwen(
        qwen2.ROW,
        model_type="qwen2_5_vl",
        stock="Qwen2_5_VL",
        svd_model_type="qwen2_5_vl_svd",
        own="qwen2_5_vl_text",
        defaults=_QWEN2_VL,
        title="Qwen2.5-VL",
        models="Qwen2.5-VL 3B to 72B",
        tiny={"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1000.0},
    ),
    _qwen(
        qwen3.ROW,
        model_type="qwen3_vl",
        stock="Qwen3VL",
        svd_model_type="qwen3_vl_svd",
        own="qwen3_vl_text",
        renames=(),
        flat=(),
        defaults={
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 22_016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 128_000,
        },
        title="Qwen3-VL",
        models="Qwen3-VL 2B to 32B",
        tiny={
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "rope_theta": 1000.0,
            "use_sliding_window": None,
            "sliding_window": None,
            "max_window_layers": None,
        },
    ),
    _qwen(
        qwen2.ROW,
        model_type="qwen2_vl",
        stock="Qwen2VL",
        svd_model_type="qwen2_vl_svd",
        own="qwen2_vl_text",
        defaults=_QWEN2_VL,
        title="Qwen2-VL",
        models="Qwen2-VL 2B, 7B, 72B",
        tiny={"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1000.0},
    ),
    *(
        _beside_a_projector(
            model_type="llava",
            stock="Llava",
            svd_model_type=f"llava_{row.model_type}_svd",
            text=row,
            defaults=defaults,
            title="LLaVA",
            models=models,
        )
        for row, defaults, models in (
            (llama.ROW, _LLAMA, "LLaVA 1.5"),
            (mistral.ROW, _MISTRAL, "Pixtral 12B, BakLLaVA"),
            (qwen2.ROW, {}, "LLaVA Interleave"),
        )
    ),
)
FACTORED_TOWERS: Mapping[str, Tower] = {tower.svd_model_type: tower for tower in TOWERS}


def tower_of(config: Config) -> Tower | None:
    """The model that sees whose config.json this is, dense or factored; of a kind with a language model that is none
    of those that convert, its first row."""
    kind, inner = config.get("model_type"), config.get("text_config")
    rows = [tower for tower in TOWERS if kind in (tower.model_type, tower.svd_model_type)]
    named = inner.get("model_type") if isinstance(inner, Mapping) else None
    return next((tower for tower in rows if named in tower.language_types), rows[0] if rows else None)


def language_config(config: Config, where: str) -> dict[str, Any]:
    """The config of the language model in a model that sees; that of any other model as it is.

    Raises:
        InputError: it has none, or none that converts.
    """
    tower = tower_of(config)
    if tower is None:
        return dict(config)
    found, inner = tower.text_config(config, where), config.get("text_config")
    named = inner.get("model_type") if isinstance(inner, Mapping) else None
    factored = config["model_type"] == tower.svd_model_type
    if named is not None and named != tower.language_types[factored]:
        known = [other.language_types[factored] for other in TOWERS if config["model_type"] in _types(other)]
        raise InputError(
            f"config.json of {where} has text_config.model_type {named!r}, but a model of type "
            f"{config['model_type']!r} is converted where it is {' or '.join(map(repr, known))}; give one of that kind"
        )
    return found


def _types(tower: Tower) -> tuple[str, str]:
    return tower.model_type, tower.svd_model_type
