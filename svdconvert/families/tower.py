"""Models that see, around a language model of the table: which there are, and their language model's config. No torch.

Their language model is converted as the family of the table that it is; everything else is copied. So all but what is
written sees a language model: its config, and its tensors by the names that they have in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families import gemma3_text
from svdconvert.families.row import Architecture, Config

# Fields of the whole that its language model's config may leave to it.
_INHERITED = ("torch_dtype", "dtype", "tie_word_embeddings", "quantization_config")
# Fields of a factored language model that are the whole's, where it is a part of one.
_OUTER = ("auto_map", "architectures", "torch_dtype", "dtype", "transformers_version")


@dataclass(frozen=True)
class Tower:
    """A model that sees.

    Attributes:
        model_type: ``config.json``'s model_type of the dense model.
        stock: prefix of the names of its classes in transformers.
        svd_model_type: ``config.json``'s model_type of the factored one; its file is modeling_TYPE.py.
        text: the row of its language model.
        prefixes: of the language model's names in files, where ``text`` has ``text.prefix``; the first one is that of
            published checkpoints, the others are what transformers has in memory.
        heads: names of the output head in files.
        vision: the modules beside the language model, as transformers has them in memory.
        defaults: fields of the language model's config that published files leave out.
        models: published models, for docs/families.md.
    """

    model_type: str
    stock: str
    svd_model_type: str
    text: Architecture
    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    vision: tuple[str, ...]
    defaults: Mapping[str, Any]
    models: str

    @property
    def dense_class(self) -> str:
        """Class name of the dense model."""
        return f"{self.stock}ForConditionalGeneration"

    @property
    def factored_class(self) -> str:
        """Class name of the factored model."""
        return f"{self.stock}SVDForConditionalGeneration"

    @property
    def modeling(self) -> str:
        """Name of the modeling file, without its ending."""
        return f"modeling_{self.svd_model_type}"

    @property
    def auto_map(self) -> dict[str, str]:
        """``config.json``'s auto_map."""
        classes = {
            "AutoConfig": f"{self.stock}SVDConfig",
            "AutoModel": f"{self.stock}SVDModel",
            "AutoModelForImageTextToText": self.factored_class,
        }
        return {auto: f"{self.modeling}.{name}" for auto, name in classes.items()}

    @property
    def rendered(self) -> Architecture:
        """The row of the language model's classes in the modeling file, where the plain names are the whole's."""
        return replace(
            self.text, factored=f"{self.stock}TextSVD", classifies=False, labels="", template="tower", prefix="model."
        )

    def text_config(self, config: Config, where: str) -> dict[str, Any]:
        """The config of the language model by itself, dense or factored.

        Raises:
            InputError: there is none.
        """
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise InputError(
                f"config.json of {where} has no text_config, which describes the language model of a "
                f"{self.model_type} model; add it"
            )
        found = {name: config[name] for name in _INHERITED if config.get(name) is not None}
        found |= {name: value for name, value in inner.items() if value is not None or name not in found}
        for name, value in self.defaults.items():
            found.setdefault(name, value)
        factored = config["model_type"] == self.svd_model_type
        kind = self.text.svd_model_type if factored else self.text.model_type
        if inner.get("model_type", kind) != kind:
            raise InputError(
                f"config.json of {where} has text_config.model_type {inner['model_type']!r}, but a model of type "
                f"{config['model_type']!r} has {kind!r} there; correct it"
            )
        return found | {"model_type": kind, "architectures": [self.text.dense_class]}

    def whole_config(self, whole: Config, text: Config) -> dict[str, Any]:
        """config.json of a result.

        Args:
            whole: the source's.
            text: that of its language model in the result, dense or factored.
        """
        factored = "svd_ranks" in text
        kept = ("auto_map", "_name_or_path", "dtype", "torch_dtype")
        found = {name: value for name, value in whole.items() if name not in kept}
        dtype = text.get("torch_dtype") or text.get("dtype")
        code = text.get("auto_map", {})
        own = {name: value for name, value in code.items() if name not in self.text.auto_map}
        own |= self.auto_map if factored else {}
        found |= {
            "architectures": [self.factored_class if factored else self.dense_class],
            "model_type": self.svd_model_type if factored else self.model_type,
            "text_config": {name: value for name, value in text.items() if name not in _OUTER},
            "tie_word_embeddings": text["tie_word_embeddings"],
            **({"auto_map": own} if own else {}),
            **({"torch_dtype": dtype} if dtype else {}),
        }
        return found


TOWERS: Mapping[str, Tower] = {
    "gemma3": Tower(
        model_type="gemma3",
        stock="Gemma3",
        svd_model_type="gemma3_svd",
        text=gemma3_text.ROW,
        prefixes=("language_model.model.", "model.language_model."),
        heads=("language_model.lm_head.weight", "lm_head.weight"),
        vision=("vision_tower", "multi_modal_projector"),
        defaults={
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        models="Gemma 3 4B, 12B, 27B",
    ),
}
FACTORED_TOWERS: Mapping[str, Tower] = {tower.svd_model_type: tower for tower in TOWERS.values()}


def tower_of(config: Config) -> Tower | None:
    """The model that sees whose config.json this is, dense or factored."""
    kind = config.get("model_type")
    return {**TOWERS, **FACTORED_TOWERS}.get(kind) if isinstance(kind, str) else None


def language_config(config: Config, where: str) -> dict[str, Any]:
    """The config of the language model in a model that sees; that of any other model as it is.

    Raises:
        InputError: it has none.
    """
    tower = tower_of(config)
    return dict(config) if tower is None else tower.text_config(config, where)
