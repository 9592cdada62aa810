"""Products of float32 matrices on the CPU, by whichever of torch's libraries uses the whole width of its vector units.

torch multiplies float32 matrices with MKL. On processors of other makers MKL stops at AVX2, half the width of those
that have AVX-512; oneDNN, which torch carries for convolutions, does not, and takes less than half the time there
(docs/measurements.md). Its products are float32 with float32 sums, too: they differ by the order of the additions.

The choice depends on the machine alone, never on a measured time, so that the same command gives the same bits again.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Multiplications below which a product is left to torch: oneDNN takes some microseconds to be called.
LEAST_PRODUCT = 2**20

_ATEN = torch.ops.aten


@cache
def prefers_onednn() -> bool:
    """Whether float32 products of this machine's CPU are left to oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() not in ("", "GenuineIntel")
    )


def multiplied_by(kind: str) -> str:
    """The library that multiplies float32 matrices on a kind of device, as torch names it."""
    if kind == "cuda":  # torch calls AMD's GPUs so, too
        return "cuBLAS" if torch.version.hip is None else "hipBLAS"
    if kind != "cpu":
        return f"torch on {kind}"
    if prefers_onednn():
        return "oneDNN"
    return "MKL" if torch.backends.mkl.is_available() else "BLAS"


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Context of this thread in which large float32 products are computed in the fastest way, gradients' included."""
    if device.type != "cpu" or not prefers_onednn():
        yield
        return
    with _ByOneDnn():
        yield


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, [m, k] times [k, n], of one type, in the fastest way."""
    if left.device.type == "cpu" and prefers_onednn() and _is_large(left, right):
        return _onednn(left, right, None)
    return left @ right


def _is_large(left: Tensor, right: Tensor) -> bool:
    return left.dtype == torch.float32 and left.shape[0] * left.shape[1] * right.shape[1] >= LEAST_PRODUCT


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    # x W^T + b, as of a linear layer. Of matrices with gaps between their rows it takes a thousand times as long.
    left, right = _dense(left), _dense(right)
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _ByOneDnn(TorchDispatchMode):
    """Takes the products that reach torch's kernels, of forward and of backward passes alike."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not kwargs:
            if function is _ATEN.mm.default and _is_large(*args):
                return _onednn(args[0], args[1], None)
            if function is _ATEN.addmm.default and args[0].dim() == 1 and _is_large(*args[1:]):
                return _onednn(args[1], args[2], args[0])
        return function(*args, **(kwargs or {}))


def _vendor() -> str:
    """Who made the processor, as it names itself; empty where it cannot be told."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as handle:
            for line in handle:
                name, _, value = line.partition(":")
                if name.strip() == "vendor_id":
                    return value.strip()
    except OSError:
        pass
    return platform.processor().rpartition(" ")[2] if "Authentic" in platform.processor() else ""
