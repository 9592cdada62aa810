"""Models that see, around a language model of the table: what a row says, and the language model's config. No torch.

Their language model is converted as the family of the table that it is; everything else is copied. So all but what is
written sees a language model: its config, and its tensors by the names that they have in it. Which there are is in
``towers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.rotary import Rotary, one_axis, rope_parameters, three_axes
from svdconvert.families.row import Architecture, Config

# What transformers calls the language model in memory, below the model without its head.
LANGUAGE_MODEL = "language_model"
# Fields of the whole that its language model's config may leave to it.
_INHERITED = ("torch_dtype", "dtype", "tie_word_embeddings", "quantization_config")
# Fields of a factored language model that are the whole's, where it is a part of one.
_OUTER = ("auto_map", "architectures", "torch_dtype", "dtype", "transformers_version")
# Fields of the whole in a config that has those of the language model beside them.
_WHOLE = (*_OUTER, "model_type", "_name_or_path", "tie_word_embeddings", "quantization_config", "vision_config")


@dataclass(frozen=True)
class Tower:
    """A model that sees, with a language model of one family. A type with several kinds of them has a row for each.

    Attributes:
        model_type: ``config.json``'s model_type of the dense model.
        stock: prefix of the names of its classes in transformers.
        svd_model_type: ``config.json``'s model_type of the factored one; its file is modeling_TYPE.py.
        text: the row of its language model.
        prefixes: of the language model's names in files, where ``text`` has ``text.prefix``: the first one that there
            is. If one is the beginning of another, it comes after it.
        heads: names of the output head in files.
        vision: the modules beside the language model, as transformers has them in memory.
        renames: patterns of names in files, and what transformers has in their place in memory.
        own: model_type of its language model, where transformers has classes of its own for that. Of a text they
            compute what ``text`` does: their positions have three coordinates, which are the same for a word.
        flat: fields of the whole, where published configs have those of the language model beside them.
        defaults: fields of the language model's config that published files leave out.
        since: the first supported version of transformers.
        title: its name in the modeling file.
        models: published models, for docs/families.md.
        processor: class of its processor, if that is not named like its other classes.
        tiny: settings of the language model in tests, on top of those of ``text``.
    """

    model_type: str
    stock: str
    svd_model_type: str
    text: Architecture
    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    vision: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]
    title: str
    models: str
    own: str = ""
    flat: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    since: tuple[int, int] = (4, 57)
    processor: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)

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
        row = replace(
            self.text,
            factored=f"{self.stock}TextSVD",
            classifies=False,
            labels="",
            template="tower",
            prefix="model.",
            title=self.title,
        )
        if not self.own:
            return row
        named = replace(row, model_type=self.own, svd_model_type=f"{self.own}_svd")
        return replace(named, stock=self.stock, text="Text", config_overrides=Rotary(theta=1_000_000.0))

    @property
    def language_types(self) -> tuple[str, str]:
        """text_config's model_type in the dense and in the factored model."""
        return self.rendered.model_type, self.rendered.svd_model_type

    def text_config(self, config: Config, where: str) -> dict[str, Any]:
        """The config of the language model by itself, dense or factored.

        Raises:
            InputError: there is none.
        """
        _, inner = self._parts(config)
        if inner is None:
            raise InputError(
                f"config.json of {where} has no text_config, which describes the language model of a "
                f"{self.model_type} model; add it"
            )
        found = {name: config[name] for name in _INHERITED if config.get(name) is not None}
        found |= {name: value for name, value in inner.items() if value is not None or name not in found}
        for name, value in self.defaults.items():
            found.setdefault(name, value)
        if self.own:
            found = one_axis(found)
            if found.get("rope_theta") is None and rope_parameters(found).get("rope_theta") is None:
                raise InputError(
                    f"config.json of {where} does not say the rope_theta of its language model, for which versions of "
                    "transformers have different defaults; add it"
                )
        factored = config["model_type"] == self.svd_model_type
        kind = self.text.svd_model_type if factored else self.text.model_type
        return found | {"model_type": kind, "architectures": [self.text.dense_class]}

    def whole_config(self, whole: Config, text: Config) -> dict[str, Any]:
        """config.json of a result.

        Args:
            whole: the source's.
            text: that of its language model in the result, dense or factored.
        """
        factored = "svd_ranks" in text
        outer, inner = self._parts(whole)
        kept = ("auto_map", "_name_or_path", "dtype", "torch_dtype", "quantization_config")
        found = {name: value for name, value in outer.items() if name not in kept}
        dtype = text.get("torch_dtype") or text.get("dtype")
        code = text.get("auto_map", {})
        own = {name: value for name, value in code.items() if name not in self.text.auto_map}
        own |= self.auto_map if factored else {}
        # which weights are packed is said of the whole, whose modules it names
        packed = text.get("quantization_config")
        language = {name: value for name, value in text.items() if name not in (*_OUTER, "quantization_config")}
        if self.own:
            language |= three_axes(language, inner or {})
        found |= {
            "architectures": [self.factored_class if factored else self.dense_class],
            "model_type": self.svd_model_type if factored else self.model_type,
            "text_config": language | {"model_type": self.language_types[factored]},
            "tie_word_embeddings": text["tie_word_embeddings"],
            **({"auto_map": own} if own else {}),
            **({"torch_dtype": dtype} if dtype else {}),
            **({"quantization_config": packed} if packed else {}),
        }
        if factored:  # without it AutoProcessor gives a tokenizer, and does not say so
            found.setdefault("processor_class", self.processor or f"{self.stock}Processor")
        return found

    def stock_config(self, config: Config) -> dict[str, Any]:
        """config.json of the dense model with the same vision, of a dense or a factored one."""
        outer, inner = self._parts(config)
        text = {**(inner or {}), "model_type": self.language_types[0]}
        return {**outer, "model_type": self.model_type, "text_config": text}

    def _parts(self, config: Config) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
        """Fields of the whole, and those of the language model; None if there are none."""
        inner = config.get("text_config")
        if inner is None and self.flat and "hidden_size" in config:
            whole = {name: value for name, value in config.items() if name in (*_WHOLE, *self.flat)}
            return whole, {name: value for name, value in config.items() if name not in whole}
        whole = {name: value for name, value in config.items() if name != "text_config"}
        return whole, inner if isinstance(inner, Mapping) else None
