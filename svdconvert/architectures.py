"""One row per supported architecture. Adding a family is adding a row here and a file in ``modeling/``."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.errors import InputError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What the tool has to know about a family.

    Attributes:
        model_type: ``config.json``'s model_type of the dense model.
        dense_class: class name of the dense model, as ``architectures`` in config.json has it.
        prefix: name of the base model inside the causal one, with the dot.
        targets: suffixes of the linear layers that are factored unless the user says otherwise.
        head: ``(name in dense checkpoints, name in factored ones)`` of the output head's weight.
        dropped: patterns of legacy buffers that old checkpoints carry and no current model reads.
        shapes: config -> every parameter of the dense model and its shape.
        config_overrides: config -> fields that a factored checkpoint's config.json has beyond the dense one's.
        svd_model_type, modeling, config_class, base_class, causal_class: the factored side.
    """

    model_type: str
    dense_class: str
    prefix: str
    targets: tuple[str, ...]
    head: tuple[str, str]
    dropped: tuple[str, ...]
    shapes: Callable[[Config], dict[str, tuple[int, ...]]]
    config_overrides: Callable[[Config], dict[str, Any]]
    svd_model_type: str
    modeling: str
    config_class: str
    base_class: str
    causal_class: str

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of the source is a legacy buffer."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.dropped)

    def factored_name(self, name: str) -> str:
        """Name in the factored checkpoint of a tensor that is copied."""
        return self.head[1] if name == self.head[0] else name

    def dense_name(self, name: str) -> str:
        """Inverse of :meth:`factored_name`."""
        return self.head[0] if name == self.head[1] else name

    @property
    def auto_map(self) -> dict[str, str]:
        """``config.json``'s auto_map. AutoModel is there because serving engines build the base model."""
        return {
            "AutoConfig": f"{self.modeling}.{self.config_class}",
            "AutoModel": f"{self.modeling}.{self.base_class}",
            "AutoModelForCausalLM": f"{self.modeling}.{self.causal_class}",
        }


def _gpt_neox_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (vocab, hidden)}
    attention_bias = config.get("attention_bias", True)
    for layer in range(config["num_hidden_layers"]):
        block = f"gpt_neox.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = shapes[f"{block}{norm}.bias"] = (hidden,)
        for name, out, inp, bias in (
            ("attention.query_key_value", 3 * hidden, hidden, attention_bias),
            ("attention.dense", hidden, hidden, attention_bias),
            ("mlp.dense_h_to_4h", inner, hidden, True),
            ("mlp.dense_4h_to_h", hidden, inner, True),
        ):
            shapes[f"{block}{name}.weight"] = (out, inp)
            if bias:
                shapes[f"{block}{name}.bias"] = (out,)
    shapes["gpt_neox.final_layer_norm.weight"] = shapes["gpt_neox.final_layer_norm.bias"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["embed_out.weight"] = (vocab, hidden)
    return shapes


def _gpt_neox_rotary(config: Config) -> dict[str, Any]:
    """Rotary settings in the spelling of transformers 4 and in that of 5: each reads only its own."""
    rope = dict(config.get("rope_parameters") or {})
    fraction = config.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    base = config.get("rotary_emb_base", rope.get("rope_theta", 10000))
    legacy = config.get("rope_scaling") or {}
    rope = {"rope_type": legacy.get("rope_type", legacy.get("type", "default")), **legacy, **rope}
    rope.pop("type", None)
    both = {
        "rotary_pct": fraction,
        "rotary_emb_base": base,
        "rope_parameters": {**rope, "rope_theta": base, "partial_rotary_factor": fraction},
    }
    if rope["rope_type"] != "default":
        both["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return both


GPT_NEOX = Architecture(
    model_type="gpt_neox",
    dense_class="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    targets=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    # transformers renamed the head in memory (embed_out to lm_head, 5.14) and renames stock checkpoints while loading,
    # but not those of custom classes; so factored checkpoints always say lm_head.
    head=("embed_out.weight", "lm_head.weight"),
    dropped=("*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.inv_freq"),
    shapes=_gpt_neox_shapes,
    config_overrides=_gpt_neox_rotary,
    svd_model_type="polyglot_svd",
    modeling="modeling_polyglot_svd",
    config_class="PolyglotSVDConfig",
    base_class="PolyglotSVDModel",
    causal_class="PolyglotSVDForCausalLM",
)

ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in (GPT_NEOX,)}
FACTORED: Mapping[str, Architecture] = {row.svd_model_type: row for row in ARCHITECTURES.values()}


def dense_architecture(config: Config, where: str) -> Architecture:
    """The row of a dense source checkpoint.

    Raises:
        InputError: the architecture is unknown, or the checkpoint is already factored or quantised.
    """
    model_type = config.get("model_type")
    if model_type in FACTORED or "svd_ranks" in config:
        raise InputError(
            f"{where} is already factored; give its dense source, or run `svdconvert densify {where} --out DIR` first"
        )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "an unknown method")
        raise InputError(
            f"{where} is already quantised ({method}); convert the unquantised model and quantise the result"
        )
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"{where} has model_type {model_type!r}, which is not supported; supported: {known}")
    return ARCHITECTURES[str(model_type)]


def factored_architecture(config: Config, where: str) -> Architecture:
    """The row of a factored checkpoint.

    Raises:
        InputError: the checkpoint is not one that svdconvert wrote.
    """
    row = FACTORED.get(str(config.get("model_type")))
    if row is None or not isinstance(config.get("svd_ranks"), dict):
        raise InputError(
            f"{where} is not a factored checkpoint (model_type {config.get('model_type')!r}); "
            "give a folder that `svdconvert` wrote"
        )
    return row
