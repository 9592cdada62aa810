"""``quantization_config`` of config.json: which weights are stored on which integer grid, as compressed-tensors has it.

Groups name modules by patterns, which transformers and vLLM match with the paths of a model's modules: that of the
causal model has the base model's prefix, the base model alone has not. Nothing is left to the order of groups: no
module is matched by two of them. vLLM looks at every linear layer, so those that stay as they are are named, too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.row import Architecture
from svdconvert.families.tower import LANGUAGE_MODEL
from svdconvert.fields import COUNT, OBJECT, TEXT, many, optional, problem, record, short, table
from svdconvert.grids import Grid
from svdconvert.storage.name_patterns import NamePattern, exactly
from svdconvert.storage.whole import Whole
from svdconvert.tensors import TensorInfo

FIELD, METHOD, FORMAT = "quantization_config", "compressed-tensors", "pack-quantized"

# The first version of compressed-tensors whose packing is the one used here. Before it no entry straddled words, so
# widths that do not divide 32 were packed in another way, under the same name.
NEEDED = "0.18.0"

_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)")
_ANYWHERE = r"(.*\.)?"
# Where the language model of a model that sees is in transformers, and in vLLM, which has a causal model there.
_WITHIN = rf"{_ANYWHERE}{LANGUAGE_MODEL}\.(model\.)?"
_WEIGHTS = {"num_bits": COUNT, "strategy": TEXT, "group_size": optional(COUNT)}
_SCHEME = {"targets": many(TEXT), "weights": record(_WEIGHTS)}
_SETTINGS = {"config_groups": table(OBJECT), "format": TEXT, "ignore": optional(many(TEXT))}
# Fields of a scheme's weights, and what they have to be.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "type": ("int",),
    "symmetric": (True, None),
    "dynamic": (False, None),
    "actorder": (None, "weight", "static"),
    "block_structure": (None,),
}


def is_packable(weight: str, row: Architecture) -> bool:
    """Whether the layer of a weight, which may be a factor, is a linear one to compressed-tensors: Conv1D is none."""
    return not row.transposed or weight.endswith((".down.weight", ".up.weight"))


def quantization_config(
    grids: Mapping[str, Grid], tensors: Iterable[TensorInfo], row: Architecture, whole: Whole | None = None
) -> dict[str, Any]:
    """The field of config.json.

    Args:
        grids: weight on a grid -> the grid, by full names (``model.layers.0.mlp.up_proj.down.weight``); all are
            :func:`packable <is_packable>`.
        tensors: all of the checkpoint; those that are no matrices do not matter.
        row: its architecture.
        whole: the model that sees of which it is the language model, by whose names tensors are given; of what it sees
            with nothing is packed.
    """
    assert all(is_packable(name, row) for name in grids)
    plain = {
        info.name.removesuffix(".weight")
        for info in tensors
        if info.name.endswith(".weight") and info.name not in grids and len(info.shape) == 2
    }
    every = {_module(name): grid for name, grid in grids.items()} | dict.fromkeys(sorted(plain | {"lm_head"}))
    patterns: dict[Grid | None, list[str]] = {}
    if whole is None:
        own, before = {module.removeprefix(row.prefix): grid for module, grid in every.items()}, _ANYWHERE
    else:
        own = {
            _module(whole.in_memory(f"{module}.weight")).removeprefix(f"model.{LANGUAGE_MODEL}."): grid
            for module, grid in every.items()
            if f"{module}.weight" not in whole.rest
        }
        before = _WITHIN
        patterns[None] = [rf"re:{_ANYWHERE}{re.escape(name)}\..*" for name in whole.tower.vision]
    for pattern, grid in _patterns(own, before):
        patterns.setdefault(grid, []).append(pattern)
    ignored = patterns.pop(None, [])
    groups = {
        f"group_{i}": {
            "targets": patterns[grid],
            "weights": grid.scheme(),
            "input_activations": None,
            "output_activations": None,
        }
        for i, grid in enumerate(sorted(grid for grid in patterns if grid is not None))
    }
    return {
        "quant_method": METHOD,
        "version": NEEDED,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def _patterns(modules: Mapping[str, Grid | None], before: str) -> Iterable[tuple[str, Grid | None]]:
    """A pattern for each kind of module and grid: of all layers, or of those that are listed.

    Args:
        modules: in the base model of a language model.
        before: a pattern of what comes before them.
    """
    kinds: dict[tuple[str, str], dict[Grid | None, list[int]]] = {}
    for module, grid in modules.items():
        match = _LAYER.fullmatch(module)
        if match is None:
            yield (module if module == "lm_head" else f"re:{before}{re.escape(module)}$"), grid
        else:
            kinds.setdefault((match[1], match[3]), {}).setdefault(grid, []).append(int(match[2]))
    for (blocks, after), found in kinds.items():
        for grid, layers in found.items():
            numbers = r"\d+" if len(found) == 1 else f"({'|'.join(map(str, sorted(layers)))})"
            yield rf"re:{before}{re.escape(blocks)}\.{numbers}\.{re.escape(after)}$", grid


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a config says that weights are stored by compressed-tensors, in whatever form."""
    settings = config.get(FIELD)
    return isinstance(settings, Mapping) and settings.get("quant_method") == METHOD


def unpacked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config for weights of floating-point types."""
    return {key: value for key, value in config.items() if key != FIELD or not is_packed(config)}


def packed_grids(
    config: Mapping[str, Any], weights: Collection[str], where: str, whole: Whole | None = None
) -> dict[str, Grid]:
    """The grids of weights that are stored packed: the reverse of :func:`quantization_config`.

    Args:
        config: a whole config.json.
        weights: full names of the packed weights, ending in ``weight``.
        where: the model, for messages.
        whole: see :func:`quantization_config`; names of its language model's own are as good.

    Raises:
        InputError: the config is damaged, says another form than this, or not exactly one grid of each weight.
    """
    settings = config.get(FIELD)
    if wrong := problem(settings, _SETTINGS):
        raise InputError(f"{FIELD} in config.json of {where} is damaged: {wrong}; convert the model again")
    assert isinstance(settings, Mapping)
    if settings["format"] not in (FORMAT, "mixed-precision"):
        raise _other(where, f"the format {short(settings['format'])}")
    groups = [(_grid(scheme, where), scheme["targets"]) for scheme in settings["config_groups"].values()]
    matchers = [(grid, [_pattern(target, where) for target in targets]) for grid, targets in groups]
    ignored = [_pattern(target, where) for target in settings.get("ignore") or []]
    found = {}
    for name in weights:
        module = _module(name if whole is None else whole.in_memory(name))
        grids = {grid for grid, targets in matchers if any(target.matches(module) for target in targets)}
        told = f"{len(grids) or 'no'} widths" if len(grids) != 1 else ""
        if not told and any(target.matches(module) for target in ignored):
            told = "a width, and that it has none"
        if told:
            raise InputError(
                f"{FIELD} in config.json of {where} says of {module}, whose weight is packed, {told}; it was changed, "
                "so convert the model again"
            )
        found[name] = grids.pop()
    return found


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def _grid(scheme: Mapping[str, Any], where: str) -> Grid:
    """The grid of a group, checked."""
    if wrong := problem(scheme, _SCHEME):
        raise InputError(f"a group of {FIELD} in config.json of {where} is damaged: {wrong}; convert the model again")
    weights = scheme["weights"]
    if scheme.get("input_activations") or scheme.get("output_activations"):
        raise _other(where, "rounded activations")
    if scheme.get("format") not in (None, FORMAT):
        raise _other(where, f"the format {short(scheme['format'])}")
    for name, allowed in _FIXED.items():
        if weights.get(name, allowed[0]) not in allowed:
            raise _other(where, f"{name} {short(weights[name])}")
    group = weights.get("group_size") or 0
    if (weights["strategy"] == "group") != bool(group) or weights["strategy"] not in ("group", "channel"):
        raise _other(where, f"the strategy {short(weights['strategy'])} with groups of {group}")
    if not 2 <= weights["num_bits"] <= 8:
        raise _other(where, f"a width of {weights['num_bits']} bits")
    return Grid.of_scheme(weights)


def _other(where: str, what: str) -> InputError:
    return InputError(
        f"{where} is quantised with {what}, which svdconvert does not read; it reads symmetric integers of 2 to 8 bits "
        f"with a scale for each row or group ({FORMAT}), so use the model with transformers, or quantise it so"
    )


def _pattern(target: str, where: str) -> NamePattern:
    """A target of a group, to be matched with module paths.

    Raises:
        InputError: it is more than the pattern of a name.
    """
    # the name of a class means all modules of it; only packed ones are asked about
    text = ".*" if target == "Linear" else target.removeprefix("re:")
    try:
        return exactly(text) if text == target else NamePattern(text)
    except ValueError:
        raise InputError(
            f"{FIELD} in config.json of {where} has the target {short(target)}, which svdconvert does not read; "
            "convert the model again"
        ) from None
