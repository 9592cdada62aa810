"""Mixtures of experts: an MLP of which a block has many, and each token passes a few. No torch.

Files have a matrix for every expert, or all experts' matrices stacked in one tensor, as transformers 5 holds them in
memory. Everything else sees the experts one by one: linear layers of their own, with a rank, a metric and a share of
the budget each. A matrix of a stack names a byte range of it (:func:`unstacked`), so that no more than one is read at
a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.families.experts import Experts
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Architecture, Config, Shapes
from svdconvert.names import layer_number, suffix
from svdconvert.tensors import Cut, TensorInfo


@dataclass(frozen=True)
class CountedTwice(Rotary):
    """Config -> the rotary settings, and the number of experts under both names that versions of transformers read.

    4 reads ``num_experts`` of Qwen 3, and 5 writes ``num_local_experts`` in its place.
    """

    def __call__(self, config: Config) -> dict[str, Any]:
        """The fields that are written."""
        count = counted(config)
        return super().__call__(config) | ({} if count is None else {"num_experts": count, "num_local_experts": count})


def counted(config: Config) -> int | None:
    """The number of experts, whichever field has it."""
    count = config.get("num_experts")
    return config.get("num_local_experts") if count is None else count


def number_of_experts(config: Config) -> int:
    """The same of a config that has to say it.

    Raises:
        KeyError: it does not.
    """
    count = counted(config)
    return int(config["num_experts"] if count is None else count)


def mixture_shapes(
    dense: Callable[[Config], Shapes],
    experts: Experts,
    is_mixture: Callable[[Config, int], bool] = lambda config, layer: True,
) -> Callable[[Config], Shapes]:
    """Shapes of a family whose blocks have experts, from those of the same with one MLP.

    Args:
        dense: config -> every parameter, with an MLP in every block.
        experts: that take its place.
        is_mixture: config and block -> whether they do.
    """

    def shapes(config: Config) -> Shapes:
        found: Shapes = {}
        for name, shape in dense(config).items():
            layer, path = layer_number(name), suffix(name)
            if layer < 0 or not path.startswith("mlp.") or not is_mixture(config, layer):
                found[name] = shape
            elif path == "mlp.down_proj.weight":  # once for a block
                block = name.removesuffix(path)
                found |= {block + own: own_shape for own, own_shape in experts.shapes(config).items()}
        return found

    return shapes


def unstacked(tensors: Mapping[str, TensorInfo], row: Architecture) -> dict[str, TensorInfo]:
    """A dense model's tensors, with stacked experts replaced by their matrices.

    Args:
        tensors: of the checkpoint, by name.
        row: its architecture.
    """
    experts = row.experts
    if experts is None:
        return dict(tensors)
    mixture = re.escape(experts.mixture_5)
    stack = re.compile(
        rf"(.*\.){mixture}\.experts\.({'|'.join(experts.stacks)}){'(_bias)?' if experts.biased else '()'}"
    )
    router = re.compile(rf"(.*\.){mixture}\.{experts.router}\.(\w+)")
    in_files = re.compile(rf"(.*\.){mixture}\.({'|'.join(map(re.escape, experts.files))})")
    found: dict[str, TensorInfo] = {}
    for stored, info in tensors.items():
        of_files = in_files.fullmatch(stored) if experts.files else None
        name = f"{of_files[1]}{experts.mixture_5}.{experts.files[of_files[2]]}" if of_files else stored
        if (match := stack.fullmatch(name)) and len(info.shape) == (2 if match[3] else 3):
            path, parts = f"{match[1]}{experts.mixture}.experts", experts.stacks[match[2]]
            found |= _parts(info, path, parts, transposed=experts.transposed)
        elif experts.mixture != experts.mixture_5 and (match := router.fullmatch(name)):
            own = f"{match[1]}{experts.mixture}.{experts.router}.{match[2]}"
            found[own] = _renamed(info, own)
        else:
            found[name] = info if name == stored else _renamed(info, name)
    return found


def _renamed(info: TensorInfo, name: str) -> TensorInfo:
    """A tensor as a whole, by another name than that in its file."""
    return replace(info, name=name, cut=Cut(info.name, 0, info.nbytes, info.nbytes))


def _parts(info: TensorInfo, path: str, parts: tuple[str, ...], *, transposed: bool) -> dict[str, TensorInfo]:
    """The matrices of a stack [experts, parts * out, in], by their names, or the biases of one [experts, parts * out].

    Args:
        info: the stack.
        path: of the experts.
        parts: names of the layers that it holds, one after the other.
        transposed: whether it is [experts, in, out], which has one part.
    """
    count, *shape = info.shape
    turned = transposed and len(shape) == 2
    if turned:
        shape.reverse()
    rows, *columns = shape
    if rows % len(parts):
        return {info.name: info}
    kind = "weight" if columns else "bias"
    length = info.nbytes // (count * len(parts))
    found = {}
    for expert in range(count):
        for place, part in enumerate(parts):
            own = f"{path}.{expert}.{part}.{kind}"
            cut = Cut(info.name, (expert * len(parts) + place) * length, length, info.nbytes, turned=turned)
            found[own] = replace(info, name=own, shape=(rows // len(parts), *columns), cut=cut)
    return found
