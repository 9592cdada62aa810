"""Mamba 2 as a part of blocks: two wide projections, which are factored, around a state, which stays. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.families.decoder import Linears
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import FACTOR, SIZE, SWITCH, given, whole
from svdconvert.fields import TEXT, Kind, either

# What config.json may say of it. The size of a head may be "auto".
FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(("mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_conv"), SIZE),
    **dict.fromkeys(("mamba_expand", "mamba_chunk_size"), SIZE),
    "mamba_d_head": given(either(whole(1), TEXT)),
    **dict.fromkeys(("mamba_conv_bias", "mamba_proj_bias"), SWITCH),
    **dict.fromkeys(("attention_multiplier", "embedding_multiplier"), FACTOR),
}


def inner_channels(config: Config) -> int:
    """Channels of the state's input and output."""
    own = config.get("mamba_d_ssm")
    return int(config.get("mamba_expand", 2) * config["hidden_size"] if own is None else own)


def _convolved(config: Config) -> int:
    return inner_channels(config) + 2 * int(config["mamba_n_groups"] * config["mamba_d_state"])


def mamba_linears(config: Config, *, out_bias: bool) -> Linears:
    """Its projections: in for gate, input, what writes and reads the state, and steps; and out.

    Args:
        config: config.json.
        out_bias: whether the second one has a bias.
    """
    hidden, inner = config["hidden_size"], inner_channels(config)
    outputs = inner + _convolved(config) + config["mamba_n_heads"]
    return {
        "mamba.in_proj": ((outputs, hidden), bool(config.get("mamba_proj_bias"))),
        "mamba.out_proj": ((hidden, inner), out_bias),
    }


def mamba_state(config: Config, *, norm: bool = True) -> Shapes:
    """What it has beside them.

    Args:
        config: config.json.
        norm: whether its output is normed.
    """
    heads, convolved = config["mamba_n_heads"], _convolved(config)
    found: Shapes = {f"mamba.{name}": (heads,) for name in ("dt_bias", "A_log", "D")}
    found["mamba.conv1d.weight"] = (convolved, 1, config["mamba_d_conv"])
    if config.get("mamba_conv_bias") is not False:
        found["mamba.conv1d.bias"] = (convolved,)
    return found | ({"mamba.norm.weight": (inner_channels(config),)} if norm else {})
