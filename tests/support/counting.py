"""Multiplications that a program really does, by the type of their numbers and the phase that it is in.

Counted are those of matrix products, of attention, and of the factorisations and eigenproblems of torch.linalg, by what
LAPACK's algorithms need (Golub and Van Loan, Matrix Computations), and one for each element of what multiplies, divides
or takes a root element by element. Nothing that bypasses torch is seen, so that a count is one of the emulated device
(``accelerator.py``), which has no LAPACK of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


def _eigenvectors(matrix: Tensor) -> int:
    """Tridiagonal form, divide and conquer, and back transformation: 2/3, 4/3 and 1 of n^3."""
    return 3 * _batch(matrix) * matrix.shape[-1] ** 3


def _cholesky(matrix: Tensor) -> int:
    return _batch(matrix) * matrix.shape[-1] ** 3 // 6


def _orthonormal(matrix: Tensor) -> int:
    """Reflections, and the columns that they stand for."""
    long, short = max(matrix.shape[-2:]), min(matrix.shape[-2:])
    return 2 * _batch(matrix) * short**2 * (3 * long - short) // 3


def _triangles(matrix: Tensor) -> int:
    long, short = max(matrix.shape[-2:]), min(matrix.shape[-2:])
    return _batch(matrix) * short**2 * (3 * long - short) // 6


def _batch(matrix: Tensor) -> int:
    return matrix.shape[:-2].numel()


# Factorisation -> its multiplications, from its arguments.
_FACTORISATIONS: Mapping[Any, Callable[..., int]] = {
    _aten._linalg_eigh.default: lambda matrix, *_, **__: _eigenvectors(matrix),
    _aten._linalg_eigh.eigenvalues: lambda matrix, *_, **__: _eigenvectors(matrix),
    _aten.linalg_cholesky_ex.default: lambda matrix, *_, **__: _cholesky(matrix),
    _aten.linalg_cholesky_ex.L: lambda matrix, *_, **__: _cholesky(matrix),
    _aten.linalg_qr.default: lambda matrix, *_, **__: _orthonormal(matrix),
    _aten.linalg_lu_factor_ex.default: lambda matrix, *_, **__: _triangles(matrix),
    _aten._linalg_solve_ex.default: lambda matrix, right, *_, **__: (
        _triangles(matrix) + matrix.shape[-1] ** 2 * (right.numel() // matrix.shape[-1])
    ),
    _aten._cholesky_solve_helper.default: lambda right, factor, *_, **__: factor.shape[-1] * right.numel(),
    _aten.cholesky_solve.default: lambda right, factor, *_, **__: factor.shape[-1] * right.numel(),
    _aten.linalg_solve_triangular.default: lambda factor, right, *_, **__: factor.shape[-1] * right.numel() // 2,
}
_ELEMENTWISE = frozenset(
    "mul mul_ div div_ square square_ sqrt sqrt_ rsqrt reciprocal reciprocal_ addr addr_ addcmul addcdiv pow lerp exp "
    "exp_ log _softmax sigmoid silu silu_backward".split()
)


class Multiplications(TorchDispatchMode):
    """Counts of every thread that is in it. Use it as a context manager in each; ``phase`` says where counts go."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.found: Counter[tuple[str, str, str]] = Counter()
        self.paused = False
        self._lock = threading.Lock()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count under another name."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def of(self, dtype: str, phase: str | None = None) -> int:
        """How many there were of a type, in one phase or all."""
        return sum(n for (where, what, _), n in self.found.items() if what == dtype and phase in (None, where))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.paused and (count := _count(func, args, kwargs or {}, result)):
            dtype = next((one.dtype for one in args if isinstance(one, Tensor)), torch.float32)
            with self._lock:
                self.found[self.phase, str(dtype)[6:], func.overloadpacket.__name__] += count
        return result


def _count(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    if func in _FACTORISATIONS:
        return _FACTORISATIONS[func](*args, **{name: value for name, value in kwargs.items() if name != "out"})
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2
    multiplies = packet.__name__ in _ELEMENTWISE or kwargs.get("alpha", 1) not in (1, -1)
    if multiplies and isinstance(result, Tensor) and result.is_floating_point():
        return result.numel()
    return 0
