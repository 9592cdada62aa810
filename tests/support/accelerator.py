"""A device that is not the CPU, on machines that have none: what runs on a GPU can be run, and watched, here.

Its tensors keep their numbers in CPU tensors but say that they lie elsewhere (on ``lazy``, one of the few names whose
devices a build for CPUs lets tensors be on). Everything computes as it would, in the branches that are for GPUs, and
what a GPU would refuse is refused: tensors of two devices in one operation, LAPACK or NumPy on memory that is not the
host's. Where the host looks at a number of the device, for which it would have to wait, is counted. What is not shown:
streams, pinned memory, and what a GPU's own kernels do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("lazy")

_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
# Indices may lie on the host.
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default)
# The size of what they return, or a Python number, depends on values.
_READING = (
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.is_nonzero.default,
)

# Operations that made the host wait for the device since :func:`device_reads` began to count.
_reads: list[str] = []


class _Elsewhere(torch.Tensor):
    """A tensor of the device; ``raw`` has its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> _Elsewhere:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def data_ptr(self) -> int:  # told apart by it, never followed
        return self.raw.data_ptr()

    def __repr__(self) -> str:
        return f"elsewhere: {self.raw!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    """Where tensors are made on the device, no argument says so yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[Tensor] = []
    _mapped(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, (args, kwargs))
    ours = {id(tensor.raw): tensor for tensor in tensors if isinstance(tensor, _Elsewhere)}
    asked = kwargs.get("device")
    there = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if ours and func not in (*_COPIES, *_INDEXING):
        if any(tensor.dim() and not isinstance(tensor, _Elsewhere) for tensor in tensors):
            raise RuntimeError(f"{func} was given tensors of two devices")
    elif func in _INDEXING and ours and not isinstance(args[0], _Elsewhere):
        raise RuntimeError(f"{func} was given indices on another device than its tensor")
    if func is _aten.copy_.default:
        there = isinstance(args[0], _Elsewhere)
    if ours and (func in _READING or (func in _COPIES and not there)):
        _reads.append(str(func))
    args, kwargs = _mapped(lambda value: value.raw if isinstance(value, _Elsewhere) else value, (args, kwargs))
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return ours.get(id(value)) if id(value) in ours else _Elsewhere(value) if there else value

    return _mapped(back, func(*args, **kwargs))


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """As tree_map, which takes most of the time of tests on this device."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_mapped(function, one) for one in value])
    if kind is dict:
        return {key: _mapped(function, one) for key, one in value.items()}
    return tree_map(function, value) if isinstance(value, tuple | list | dict) else function(value)


@contextmanager
def device_reads() -> Iterator[list[str]]:
    """Have the device there, in this thread; yields the operations in which the host waited for it, so far."""
    with _Device():
        _reads.clear()
        yield _reads


@contextmanager
def everywhere(*modes: Callable[[], Any]) -> Iterator[None]:
    """Be in modes, the first one below the others, in this thread and in every one that is started meanwhile."""
    start: Callable[[threading.Thread], None] = threading.Thread.start

    def started_within(thread: threading.Thread) -> None:
        run = thread.run  # of whatever class the thread is

        def within() -> None:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                run()

        thread.run = within  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = started_within  # type: ignore[method-assign]
    try:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


@contextmanager
def emulated(counter: TorchDispatchMode | None = None) -> Iterator[torch.device]:
    """Have the device there, in every thread.

    Args:
        counter: a mode that sees what the device computes.
    """
    with everywhere(*([] if counter is None else [lambda: counter]), _Device):
        yield DEVICE


@contextmanager
def named(*modules: str) -> Iterator[None]:
    """Have modules of svdconvert take the device's name as it is."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch(f"svdconvert.{module}.resolve_device", lambda name: name))
        yield


@contextmanager
def slow_float64(times: float = 64.0) -> Iterator[None]:
    """Have the device take so many times as long in float64 as in float32."""
    with patch.dict("svdconvert.linalg.rates._known", {str(DEVICE): times}):
        yield


@pytest.fixture
def accelerator() -> Iterator[torch.device]:
    """The device, there in every thread that is started meanwhile."""
    with emulated() as device:
        yield device


def on_host(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that may lie on the device."""
    return tensor.raw if isinstance(tensor, _Elsewhere) else tensor
