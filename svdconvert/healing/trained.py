"""Tensors in memory that are trained: factors, and the scales of weights on integer grids."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from svdconvert.families.table import factored_architecture
from svdconvert.grids import scale_of, weights_of
from svdconvert.healing.grid_weights import GridWeight, put_on_grid, take_off_grid
from svdconvert.layouts.table import layout_of, stored_names
from svdconvert.storage.reader import torch_dtype
from svdconvert.storage.rounded import read_rounded
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo


class Trained:
    """Parameters that are trained in float32, and rounded where they are stored.

    Attributes:
        factors: tensor of the checkpoint -> the parameter, float32: a factor itself, and of scales what moves them.
        start: the same -> its values at first, in the type that it is stored in.
    """

    def __init__(self, source: Source, module: nn.Module, prefix: str = "") -> None:
        """Take what a module has of them; where weights are on grids, it computes with integers and scales from now on.

        Args:
            source: the checkpoint that it is of.
            module: the model, or a part of it, with its weights.
            prefix: of its tensors in the checkpoint.
        """
        self._module, self._prefix, self._grids = module, prefix, dict[str, GridWeight]()
        self.factors: dict[str, nn.Parameter] = {}
        self._types: dict[str, torch.dtype] = {}
        parameters = dict(module.named_parameters())
        for name, weight in trained_names(source).items():
            if not name.startswith(prefix):
                continue
            path = weight.removeprefix(prefix)
            if weight in source.packed:
                self._grids[name], self.factors[name] = put_on_grid(module, path, read_rounded(source, weight))
            else:
                self.factors[name] = parameters[path]
            self._types[name] = torch_dtype(_stored(source, name, weight).dtype)
        for parameter in self.factors.values():
            parameter.requires_grad_()
        self.start: dict[str, Tensor] = self.stored()

    def release(self) -> None:
        """Let the module have plain weights again, which are yet to be filled in."""
        for weight in weights_of([*self._grids]):
            take_off_grid(self._module, weight.removeprefix(self._prefix))

    def stored(self) -> dict[str, Tensor]:
        """Copies of the tensors as a checkpoint has them, in its types, on the device."""
        found = {}
        for name, factor in self.factors.items():
            values = factor.detach()
            if name in self._grids:
                values = self._grids[name].scales(values)
            found[name] = values.to(self._types[name], copy=True)
        return found

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the tensors these values, of any floating type."""
        for name, factor in self.factors.items():
            grid = self._grids.get(name)
            factor.copy_(tensors[name] if grid is None else grid.moved(tensors[name]))

    @torch.no_grad()
    def pull(self, share: float) -> None:
        """Take the tensors a share of the way back to their start."""
        for name, factor in self.factors.items():
            factor.lerp_(torch.zeros_like(factor) if name in self._grids else self.start[name].float(), share)

    @property
    def scales(self) -> Collection[str]:
        """Names of those that are scales."""
        return self._grids.keys()

    def gradients(self) -> list[Tensor]:
        """Those of all tensors; zeros where there was none, as of experts that got no token."""
        found = []
        for factor in self.factors.values():
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            found.append(factor.grad)
        return found

    @contextmanager
    def having(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Context in which the tensors have other values."""
        own = {name: factor.detach().clone() for name, factor in self.factors.items()}
        self.put(tensors)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, factor in self.factors.items():
                    factor.copy_(own[name])


def trained_names(source: Source) -> dict[str, str]:
    """What is trained of a checkpoint: tensor -> the weight that it is of, which it is itself unless that is packed.

    Those are factors, in a floating type or packed, and packed matrices of the blocks; of packed ones the scales. No
    biases, and no positions of a layout.
    """
    row = factored_architecture(source.config, source.where)
    blocks = f"{row.prefix}{row.pieces.blocks}."
    packed = [name for name in source.packed if name.startswith(blocks)]
    weights = (*_factors(source), *packed)
    return {(scale_of(weight) if weight in source.packed else weight): weight for weight in weights}


def trained_tensors(source: Source) -> list[TensorInfo]:
    """The headers of what is trained, by those names."""
    return [_stored(source, name, weight) for name, weight in trained_names(source).items()]


def trained_numbers(source: Source) -> dict[str, int]:
    """How many numbers are trained: of ``factors``, and of ``scales``."""
    scales = {name for name, weight in trained_names(source).items() if name != weight}
    counts = {"factors": 0, "scales": 0}
    for name, info in zip(trained_names(source), trained_tensors(source), strict=True):
        counts["scales" if name in scales else "factors"] += info.size
    return counts


def _factors(source: Source) -> list[str]:
    row, layout = factored_architecture(source.config, source.where), layout_of(source.config)
    kinds = tuple(f".{suffix}" for suffix in layout.weights(1, (2, 2)))
    stored = (name for module in source.config["svd_ranks"] for name in stored_names(source.config, row.prefix, module))
    return list(dict.fromkeys(name for name in stored if name.endswith(kinds)))


def _stored(source: Source, name: str, weight: str) -> TensorInfo:
    return source.packed[weight].scale if weight in source.packed else source.tensors[name]
