"""Rotary settings in the spelling of transformers 4 and in that of 5: each reads only its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.families.row import Config
from svdconvert.fields import short

# All else in transformers 5's rope_parameters is transformers 4's rope_scaling.
_OUTSIDE = ("rope_theta", "partial_rotary_factor")
# The names of these outside of it, GPT-NeoX's among them.
_OUTER = {name: name for name in _OUTSIDE} | {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
# How the channels are divided among the coordinates of a position, where it has three.
_AXES = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Rotary:
    """Config -> ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling``, and the same as ``rope_parameters``.

    Attributes:
        theta: the base, if config.json does not say.
        fraction: of the channels that are rotated, if config.json does not say; None in families that rotate all.
        scaling: the scaling if config.json has no rotary settings, in families that have one then.
        three_fields: whether transformers 4 insists on three fields in ``rope_scaling``, those of longrope.
    """

    theta: float = 10000.0
    fraction: float | None = None
    scaling: Mapping[str, Any] | None = None
    three_fields: bool = False

    def __call__(self, config: Config) -> dict[str, Any]:
        """The fields that are written."""
        if config.get("rope_scaling") is None and config.get("rope_parameters") is None and self.scaling:
            config = {**config, "rope_scaling": self.scaling}
        rope = rope_parameters(config)
        theta = config.get("rope_theta")
        rope.setdefault("rope_theta", self.theta if theta is None else theta)
        fraction = config.get("partial_rotary_factor")
        if fraction is None:
            fraction = self.fraction
        if fraction is not None:
            rope.setdefault("partial_rotary_factor", fraction)
        both = {key: rope[key] for key in _OUTSIDE if key in rope} | {"rope_parameters": rope}
        if rope["rope_type"] != "default":
            both["rope_scaling"] = {key: value for key, value in rope.items() if key not in _OUTSIDE}
        return both


def rope_parameters(config: Config) -> dict[str, Any]:
    """Rotary settings of config.json in either spelling, with a ``rope_type``."""
    legacy, rope = dict(config.get("rope_scaling") or {}), dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", legacy.get("rope_type", legacy.get("type", "default")))
    rope = {**legacy, **rope, "rope_type": kind}
    rope.pop("type", None)
    return rope


def contradiction(config: Config) -> str | None:
    """What the two spellings say of one setting, where they differ; None where they agree or there is only one.

    transformers 4 reads the outer fields alone; 5 reads ``rope_parameters``, or ``rope_scaling`` in its place.

    >>> contradiction({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_type": "default"}})
    'rope_type "yarn" in rope_scaling, but "default" in rope_parameters'
    """
    rope, legacy = dict(config.get("rope_parameters") or {}), dict(config.get("rope_scaling") or {})
    if not rope or any(isinstance(value, Mapping) for value in rope.values()):
        return None  # settings by kind of layer are left as they are
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if legacy:
        kind = legacy.pop("type", "default")
        legacy = {"rope_type": legacy.get("rope_type", kind), **legacy}
    said = [(f"{key} {short(value)} in rope_scaling", key, value) for key, value in legacy.items()]
    outer = [(name, key, config[name]) for name, key in _OUTER.items() if name in config and key in rope]
    said += [(f"{name} {short(value)}", key, value) for name, key, value in outer]
    for words, key, value in said:
        if value is not None and value != rope.get(key):
            return f"{words}, but {short(rope.get(key))} in rope_parameters"
    return None


def one_axis(config: Config) -> dict[str, Any]:
    """A config whose positions have three coordinates as one whose positions are numbers: the same model of a text."""
    found = dict(config)
    for spelling in ("rope_scaling", "rope_parameters"):
        if rope := dict(config.get(spelling) or {}):
            kind = rope.get("rope_type", rope.pop("type", "default"))
            # transformers' first name for what rotates as usual
            rope["rope_type"] = "default" if kind == "mrope" else kind
            found[spelling] = {key: value for key, value in rope.items() if key not in (*_AXES, "type")}
    return found


def three_axes(config: Config, source: Config) -> dict[str, Any]:
    """Inverse of :func:`one_axis`: rotary settings in both spellings.

    Args:
        config: with those of :class:`Rotary`.
        source: the config that ``config`` was made from.
    """
    axes = {key: value for key, value in rope_parameters(source).items() if key in _AXES}
    rope = {**config["rope_parameters"], **axes}
    scaling = {key: value for key, value in rope.items() if key not in _OUTSIDE}
    return {"rope_parameters": rope, "rope_scaling": scaling}


def gpt_neox(config: Config) -> dict[str, Any]:
    """The same for GPT-NeoX, which has names of its own in transformers 4."""
    rope = rope_parameters(config)
    fraction = config.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    base = config.get("rotary_emb_base", rope.get("rope_theta", 10000))
    rope |= {"rope_theta": base, "partial_rotary_factor": fraction}
    both = {"rotary_pct": fraction, "rotary_emb_base": base, "rope_parameters": rope}
    if rope["rope_type"] != "default":
        both["rope_scaling"] = {key: value for key, value in rope.items() if key not in _OUTSIDE}
    return both


class Phi3(Rotary):
    """The same for Phi-3, for which transformers 4 insists on three fields in rope_scaling.

    Its first checkpoints have other names for their scaling, which transformers 5 no longer understands.
    """

    def __call__(self, config: Config) -> dict[str, Any]:
        """The fields that are written."""
        rope = rope_parameters(config)
        if rope["rope_type"] in ("su", "yarn"):
            config = {**config, "rope_parameters": rope | {"rope_type": "longrope"}}
        both = super().__call__(config)
        if "rope_scaling" in both:
            scaling = both["rope_scaling"]
            if "original_max_position_embeddings" in config:
                both["rope_parameters"]["original_max_position_embeddings"] = config["original_max_position_embeddings"]
            factors = {key: scaling[key] for key in ("short_factor", "long_factor") if key in scaling}
            both["rope_scaling"] = {"type": scaling["rope_type"], **factors}
        return both
