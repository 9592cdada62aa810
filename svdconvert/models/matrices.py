"""The matrices [out, in] of a block's linear layers, whole ones and parts of fused ones, to read and to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
    """Context with other weights [out, in] in some linear layers of a block, or parts of them, by path.

    They are asked for one by one. A layer that has no weight yet, as it is read only while its expert is run, gets the
    other one whenever it is called.
    """
    layers: dict[str, list[tuple[str, Section | None]]] = {}
    for path in matrices:
        name, section = places(path)
        layers.setdefault(name, []).append((path, section))
    dense: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.callback(_put_back, block, dense)
        for name, parts in layers.items():
            layer = block.get_submodule(name)
            if layer.weight.is_meta:
                stack.enter_context(_while_called(layer, partial(_other, layer, matrices, parts)))
            else:
                dense[name] = layer.weight
                layer.weight = _other(layer, matrices, parts)
        yield


def _other(layer: nn.Module, matrices: Mapping[str, Tensor], parts: Sequence[tuple[str, Section | None]]) -> Tensor:
    """A layer's weight, as it stores it, with other matrices in its place.

    Args:
        layer: with the weight that is there.
        matrices: by path.
        parts: paths, and the section of the layer that each is.
    """
    weight = _matrix(layer)
    for path, section in parts:
        other = matrices[path].to(weight)
        if section is None:
            weight = other
            continue
        weight = weight.clone()
        section.put(other, weight)
    return nn.Parameter(weight if isinstance(layer, nn.Linear) else weight.T, requires_grad=False)


@contextmanager
def _while_called(layer: nn.Module, other: Callable[[], Tensor]) -> Iterator[None]:
    """Context in which a layer has another weight whenever it is called."""
    own: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        own.append(module.weight)
        module.weight = other()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module.weight = own.pop()

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put_back(block: nn.Module, weights: Mapping[str, Any]) -> None:
    for name, weight in weights.items():
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
