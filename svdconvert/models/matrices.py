"""The matrices [out, in] of a block's linear layers, whole ones and parts of fused ones, to read and to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn, zeros_like

from svdconvert.families.row import Section

# path within a block -> the path of its linear layer, and which of its outputs are meant; None for all
Places = Callable[[str], tuple[str, Section | None]]


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a dense linear layer."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def matrix(block: nn.Module, path: str, places: Places) -> Tensor:
    """Weight [out, in] of a linear layer in a block, or of a part of one."""
    layer, section = places(path)
    whole = _matrix(block.get_submodule(layer))
    return whole if section is None else section.of(whole)


@contextmanager
def replaced(block: nn.Module, matrices: Mapping[str, Tensor], places: Places) -> Iterator[None]:
    """Context with other weights [out, in] in some linear layers of a block, or parts of them, by path."""
    layers = [places(path)[0] for path in matrices]
    dense: dict[str, Any] = {layer: block.get_submodule(layer).weight for layer in layers}
    try:
        for path, other in matrices.items():
            name, section = places(path)
            layer = block.get_submodule(name)
            weight = other.to(_matrix(layer))
            if section is not None:
                part, weight = weight, _matrix(layer).clone()
                section.put(part, weight)
            layer.weight = nn.Parameter(weight if isinstance(layer, nn.Linear) else weight.T, requires_grad=False)
        yield
    finally:
        for name, weight in dense.items():
            block.get_submodule(name).weight = weight


@contextmanager
def differentiable(block: nn.Module, paths: Sequence[str], places: Places) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Context in which backward passes differentiate by the weights of linear layers of a block, or parts of them.

    Args:
        block: with the weights that count.
        paths: of the layers.
        places: see :data:`Places`.

    Yields:
        Takes the gradients that have been summed up: path -> [out, in]. The sums begin anew.
    """
    layers = {path: places(path) for path in paths}
    weights = {name: block.get_submodule(name).weight for name, _ in layers.values()}
    for weight in weights.values():
        weight.requires_grad_(True)

    def take() -> dict[str, Tensor]:
        found = {}
        for path, (name, section) in layers.items():
            weight = weights[name]
            assert isinstance(weight, Tensor)
            # there is none for an expert that no token was sent to
            gradient = zeros_like(weight) if weight.grad is None else weight.grad
            whole = gradient if isinstance(block.get_submodule(name), nn.Linear) else gradient.T
            found[path] = whole if section is None else section.of(whole)
        for weight in weights.values():
            weight.grad = None
        return found

    try:
        yield take
    finally:
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(False)


def _matrix(layer: nn.Module) -> Tensor:
    """Weight [out, in] of a linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T  # Conv1D of GPT-2 has it as [in, out]
