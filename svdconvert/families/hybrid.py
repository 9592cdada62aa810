"""Models whose blocks are of several kinds: attention in some, in others a state that is carried from token to token.

Linear projections are factored. What carries the state stays: its convolution, its decays, its norms, and the narrow
projections that set them for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from svdconvert.families.decoder import Linears, separate
from svdconvert.families.row import Config, Shapes
from svdconvert.families.values import SIZE, whole
from svdconvert.fields import Kind, many, optional
from svdconvert.names import layer_number

FULL, LINEAR = "full_attention", "linear_attention"
# The number that a name outside of blocks gives.
OUTSIDE = -1


def one_kind_in(rhythm: str, default: int) -> Callable[[Config], list[str]]:
    """Config -> kind of each block: as it lists them, or full attention in every so many-th and linear in the others.

    Args:
        rhythm: field with the number.
        default: the number if config.json does not say.
    """

    def kinds(config: Config) -> list[str]:
        if (listed := config.get("layer_types")) is not None:
            return list(listed)
        every = config.get(rhythm) or default
        return [LINEAR if layer % every else FULL for layer in range(1, config["num_hidden_layers"] + 1)]

    return kinds


def kinds_field(*names: str) -> Kind:
    """What ``layer_types`` may hold."""
    return optional(many(Kind(f"{', '.join(names[:-1])} or {names[-1]}", lambda value: value in list(names))))


def mixed_shapes(
    kinds: Callable[[Config], Sequence[str]], shapes: Mapping[str, Callable[[Config], Shapes]]
) -> Callable[[Config], Shapes]:
    """Shapes of a family from those of the same with blocks of one kind.

    Args:
        kinds: config -> kind of each block.
        shapes: kind -> config -> every parameter of a model whose blocks are all of that kind.

    Returns:
        A function that raises ValueError if the kinds are not as many as the blocks.
    """

    def mixed(config: Config) -> Shapes:
        listed = kinds(config)
        # of those that there are: files need not have the fields of the others
        uniform = {kind: _by_block(shapes[kind](config)) for kind in dict.fromkeys(listed)}
        blocks = zip(range(config["num_hidden_layers"]), listed, strict=True)
        (embeddings, shape), *others = next(iter(uniform.values()))[OUTSIDE].items()
        found: Shapes = {embeddings: shape}
        for block, kind in blocks:
            found |= uniform[kind][block]
        return found | dict(others)

    return mixed


def _by_block(shapes: Shapes) -> dict[int, Shapes]:
    """Shapes by block, or by OUTSIDE."""
    found: dict[int, Shapes] = {}
    for name, shape in shapes.items():
        found.setdefault(layer_number(name), {})[name] = shape
    return found


# What config.json may say of gated delta nets, and of which blocks have one.
DELTA_NET_FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim"), SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), SIZE),
    "full_attention_interval": optional(whole(1)),
    "layer_types": kinds_field(LINEAR, FULL),
}


def gated_queries(config: Config) -> Linears:
    """A block's seven linear layers where queries come with a gate for the outputs of their head."""
    bias = bool(config.get("attention_bias"))
    linears = dict(separate(config, qkv_bias=bias, o_bias=bias))
    (queries, hidden), _ = linears["self_attn.q_proj"]
    return linears | {"self_attn.q_proj": ((2 * queries, hidden), bias)}


def delta_net_sizes(config: Config) -> tuple[int, int, int]:
    """Channels of the keys (or queries) and of the values of a gated delta net, and its heads of values."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    heads = config["linear_num_value_heads"]
    return keys, heads * config["linear_value_head_dim"], heads


def delta_net_state(config: Config) -> Shapes:
    """What a gated delta net has beside its projections."""
    keys, values, heads = delta_net_sizes(config)
    return {
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
    }


def mlp(config: Config) -> Linears:
    """The linear layers of a block's MLP."""
    return {name: linear for name, linear in separate(config).items() if name.startswith("mlp.")}
