"""How a rank-r product is stored: which tensors, under which names, and what they cost. No torch.

``balanced`` stores two factors, r (m + n) numbers. ``pivoted`` stores r rows of the product and the coefficients of the
others, r (m + n - r), see ``linalg/pivot.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.tensors import TensorInfo

Shape = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """A way to store a product of rank r and shape (out, in).

    Attributes:
        name: as on the command line and in config.json's ``svd_layout``.
        weights: (r, (out, in)) -> suffix of the tensor's name -> its shape.
        index: suffix of the tensor of output positions, [out] int64, or None.
        bias: suffix of the bias.
    """

    name: str
    weights: Callable[[int, Shape], Mapping[str, Shape]]
    index: str | None
    bias: str

    def cost(self, rank: int, shape: Shape) -> int:
        """Parameters stored; the positions are no parameters."""
        return sum(rows * columns for rows, columns in self.weights(rank, shape).values())

    def break_even(self, shape: Shape) -> float:
        """The rank from which on nothing is saved."""
        m, n = shape
        return m * n / (m + n) if self.index is None else float(min(m, n))

    def highest_rank(self, shape: Shape, params: float) -> int:
        """The highest rank that costs at most so many parameters; 0 if there is none."""
        low, high = 0, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost(middle, shape) <= params else (low, middle - 1)
        return low

    def names(self, weight: str) -> tuple[str, ...]:
        """Names of the tensors that take the place of one dense weight."""
        stem = weight.removesuffix("weight")
        return tuple(stem + suffix for suffix in (*self.weights(1, (2, 2)), *([self.index] if self.index else [])))

    def bias_name(self, bias: str) -> str:
        """Name of a factored layer's bias."""
        return bias.removesuffix("bias") + self.bias

    def tensors(self, weight: str, rank: int, shape: Shape, dtype: str) -> tuple[TensorInfo, ...]:
        """The tensors that take the place of one dense weight, in the order of :meth:`names`."""
        names, stored = self.names(weight), self.weights(rank, shape)
        infos = [TensorInfo(name, dtype, size) for name, size in zip(names, stored.values(), strict=False)]
        if self.index:
            infos.append(TensorInfo(names[-1], "I64", (shape[0],)))
        return tuple(infos)


LAYOUTS: Mapping[str, Layout] = {
    row.name: row
    for row in (
        Layout(
            "balanced",
            lambda rank, shape: {"down.weight": (rank, shape[1]), "up.weight": (shape[0], rank)},
            index=None,
            bias="up.bias",
        ),
        Layout(
            "pivoted",
            lambda rank, shape: {"down.weight": (rank, shape[1]), "up.weight": (shape[0] - rank, rank)},
            index="position",
            bias="bias",
        ),
    )
}
DEFAULT = LAYOUTS["balanced"]


def layout_named(name: str) -> Layout:
    """Look a layout up.

    Raises:
        InputError: there is none of that name.
    """
    if name not in LAYOUTS:
        raise InputError(f"{asked('layout', name)} is unknown; choose {' or '.join(LAYOUTS)}")
    return LAYOUTS[name]


def stored_names(config: Mapping[str, Any], prefix: str, module: str) -> tuple[str, ...]:
    """Names of the tensors that a factored layer is made of, as :meth:`Layout.names`.

    A layer that shares has the first one where its owner has it.

    Args:
        config: of the factored checkpoint.
        prefix: of the base model in tensor names.
        module: path of the layer in the base model.
    """
    layout = layout_of(config)
    names = layout.names(f"{prefix}{module}.weight")
    owner = shared_layers(config).get(module)
    return names if owner is None else (layout.names(f"{prefix}{owner}.weight")[0], *names[1:])


def outer_shape(stored: Sequence[TensorInfo]) -> tuple[int, int]:
    """``(out, in)`` of the dense matrix that stored tensors stand for."""
    down, up, *position = stored
    return (position[0].shape[0] if position else up.shape[0]), down.shape[1]


def shared_layers(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Layer -> the one whose input-side factor it uses, of a factored checkpoint."""
    return dict(config.get("svd_shared") or {})


def layout_of(config: Mapping[str, object]) -> Layout:
    """The layout of a factored checkpoint."""
    return layout_named(str(config.get("svd_layout", DEFAULT.name)))
