"""LAPACK and BLAS routines that torch does not offer: a symmetric eigenproblem of which only some vectors are wanted.

torch.linalg.eigh computes all eigenvectors and transforms all of them back. Done in its three steps (tridiagonal
form, its eigenvectors by divide and conquer, back transformation of the wanted ones), the problem at a quarter of the
vectors takes half the time (docs/measurements-solver.md). SciPy carries a whole LAPACK (OpenBLAS) and exports it for
use from compiled code, by address; calls go through ctypes, which lets other threads of Python run meanwhile.

Fortran's matrices are stored by columns: a row-major tensor is its own transpose there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char, c_int, c_void_p
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

_PREFIX = {torch.float32: "s", torch.float64: "d"}
_SCALAR = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}


@cache
def _routine(name: str) -> Any:
    """A routine by its Fortran name, the type's letter in front; all its arguments are addresses."""
    library = "cython_blas" if name[1:] in ("syrk", "trmm") else "cython_lapack"
    capsule = import_module(f"scipy.linalg.{library}").__pyx_capi__[name]
    get_name, get_pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    get_pointer.restype, get_pointer.argtypes = c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature = get_name(capsule)
    arguments = signature.count(b",") + 1
    assert b"int *" in signature, signature  # 32-bit integers, which this module passes
    return ctypes.CFUNCTYPE(None, *[c_void_p] * arguments)(get_pointer(capsule, signature))


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call a routine of a type; numbers and letters are passed by address, tensors by that of their data."""
    kept = [_by_address(argument) for argument in arguments]
    _routine(_PREFIX[dtype] + name)(*[a if isinstance(a, c_void_p) else ctypes.cast(byref(a), c_void_p) for a in kept])


def _by_address(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        assert argument.device.type == "cpu", argument.device
        return c_void_p(argument.data_ptr())
    if isinstance(argument, str):
        return c_char(argument.encode())
    return c_int(argument) if isinstance(argument, int) else argument


def add_gram(rows: Tensor, gram: Tensor, *, transposed: bool = False) -> None:
    """gram += rows^T rows, or rows rows^T, in the lower triangle.

    Args:
        rows: [p, k] or, if transposed, [k, p]; float32 or float64, on the CPU.
        gram: [k, k], contiguous, of the same type; what is above the diagonal is not touched.
        transposed: rows are the columns of the matrix given.
    """
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    assert gram.is_contiguous()
    assert rows.dtype == gram.dtype
    k = gram.shape[0]
    depth = rows.shape[1] if transposed else rows.shape[0]
    one = _SCALAR[gram.dtype](1)
    # In Fortran's eyes the lower triangle is the upper one, and [p, k] is k x p.
    stride = max(rows.stride(0), rows.shape[1])
    _call("syrk", gram.dtype, "U", "T" if transposed else "N", k, depth, one, rows, stride, one, gram, k)


def top_eigenvectors(gram: Tensor, count: int, vectors: Tensor, work: Tensor) -> Tensor:
    """Eigenvalues, and the eigenvectors of the largest ones, of a symmetric matrix given by its lower triangle.

    LAPACK's sytrd, stedc and ormtr (Golub and Van Loan, Matrix Computations, 8.3 and 8.4), as in syevd but for the
    number of vectors that is transformed back.

    Args:
        gram: [k, k], float32 or float64, contiguous, on the CPU; overwritten.
        count: how many vectors.
        vectors: [k, k], contiguous, of the same type: row j becomes the eigenvector of the j-th value, ascending; only
            the last ``count`` rows are.
        work: flat, of the same type, of at least :func:`work_size` elements.

    Returns:
        [k], of the same type: all eigenvalues, ascending.

    Raises:
        torch.linalg.LinAlgError: the divide and conquer did not come to an end.
    """
    k, dtype = gram.shape[0], gram.dtype
    assert gram.is_contiguous()
    assert vectors.is_contiguous()
    assert work.numel() >= work_size(k)
    values, off = torch.empty(k, dtype=dtype), torch.empty(max(k - 1, 1), dtype=dtype)
    tau, info = torch.empty(max(k - 1, 1), dtype=dtype), c_int(0)
    integers = torch.empty(3 + 5 * k, dtype=torch.int32)
    # In Fortran's eyes the lower triangle is the upper one.
    _call("sytrd", dtype, "U", k, gram, k, values, off, tau, work, work.numel(), info)
    assert info.value == 0, info
    _call("stedc", dtype, "I", k, values, off, vectors, k, work, work.numel(), integers, integers.numel(), info)
    if info.value:
        raise LinAlgError(f"the eigenvalues did not converge (stedc: {info.value})")
    wanted = vectors[k - count :]
    _call("ormtr", dtype, "L", "U", "N", k, count, gram, k, tau, wanted, k, work, work.numel(), info)
    assert info.value == 0, info
    return values


def congruence(metric: Tensor, root: Tensor) -> None:
    """metric <- root^T metric root, in the lower triangle: a quarter of two products' arithmetic (LAPACK's sygst).

    Args:
        metric: [k, k], symmetric, float32 or float64, contiguous, on the CPU; only the lower triangle is read and
            written.
        root: [k, k], contiguous, of the same type: a Cholesky factor, lower, with a positive diagonal.
    """
    assert metric.is_contiguous()
    assert root.is_contiguous()
    assert metric.dtype == root.dtype
    k, info = metric.shape[0], c_int(0)
    _call("sygst", metric.dtype, 2, "U", k, metric, k, root, k, info)
    assert info.value == 0, info


def multiply_rows(root: Tensor, rows: Tensor) -> None:
    """Every row v <- root v, for a lower triangular matrix (BLAS' trmm).

    Args:
        root: [k, k], float32 or float64, contiguous, on the CPU; only the lower triangle is read.
        rows: [count, k], contiguous, of the same type; overwritten.
    """
    assert root.is_contiguous()
    assert rows.is_contiguous()
    assert root.dtype == rows.dtype
    count, k = rows.shape
    _call("trmm", root.dtype, "L", "U", "T", "N", k, count, _SCALAR[root.dtype](1), root, k, rows, k)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the routines of this module use so many threads each, as torch.set_num_threads does for torch's own."""
    from threadpoolctl import threadpool_limits

    import_module("scipy.linalg.cython_lapack")  # what is not loaded yet is not limited
    with threadpool_limits(count, user_api="blas"):
        yield


def work_size(k: int) -> int:
    """Elements of workspace that :func:`top_eigenvectors` needs for a [k, k] matrix."""
    return max(1 + 4 * k + k * k, 64 * k)
