"""Products of float64 matrices, where float64 is slow from products of float32 that are exact.

Each row of the left matrix and each column of the right one is scaled by a power of two and cut into slices of eight
bits (Ozaki et al., "Error-free transformations of matrix multiplication", 2012). A product of two slices is a sum of
integers below 2^24, which float32 holds exactly; those that matter are added up in float64. With five slices the error
is some 1e-12 of the largest entries' product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.rates import has_slow_float64

# Bits of a slice, how many there are, and terms of a sum that stays exact: 2^7 2^7 2^10 = 2^24.
_BITS, _SLICES, _TERMS = 8, 5, 2**10

# Multiplications below which a product is left to float64.
_LEAST = 2**15


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, [m, k] times [k, n], of one floating type, with the digits of that type that count.

    Args:
        left, right: the matrices.
        out: where the result goes.
    """
    size = left.shape[0] * left.shape[1] * right.shape[1]
    if left.dtype != torch.float64 or size < _LEAST or not has_slow_float64(left.device):
        return torch.mm(left, right, out=out)
    ours, rows = _slices(left, 1)
    theirs, columns = _slices(right, 0)
    total = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    # the smallest first
    for place in range(_SLICES - 1, -1, -1):
        for i in range(place + 1):
            if i >= len(ours) or place - i >= len(theirs):
                continue
            one, other = ours[i], theirs[place - i]
            for start in range(0, left.shape[1], _TERMS):
                part = slice(start, start + _TERMS)
                total += one[:, part] @ other[part]
    total.mul_(rows).mul_(columns)
    return total if out is None else out.copy_(total)


def add_product(total: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """total += sign left @ right."""
    if left.dtype == torch.float64 and has_slow_float64(left.device):
        total.add_(product(left, right), alpha=sign)
    else:
        total.addmm_(left, right, alpha=sign)


def solve_by_root(root: Tensor, right: Tensor) -> Tensor:
    """(root root^T)^-1 right, for a Cholesky factor, lower."""
    if root.dtype != torch.float64 or not has_slow_float64(root.device):
        return torch.cholesky_solve(right, root)
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)
    return product(inverse.T, product(inverse, right))


def _slices(matrix: Tensor, axis: int) -> tuple[list[Tensor], Tensor]:
    """Slices in float32, largest first, and what their sum is to be multiplied with.

    Each is integers of eight bits times a power of two, 2^-8 of the power of the one before.
    """
    _, exponents = torch.frexp(matrix.abs().amax(dim=axis, keepdim=True))
    exponents = exponents.double() - (_BITS - 1)
    rest, found = matrix * torch.pow(2.0, -exponents), []
    for place in range(_SLICES):
        if place == 2:
            rest = rest.float()  # which holds all that is left to be taken
            # of 16-bit weights that is often nothing; asked once, as the host waits for it
            if not bool(rest.any()):
                break
        unit = 2.0 ** (_BITS * place)
        whole = (rest * unit).round() / unit if place else rest.round()
        found.append(whole.float())
        rest = rest - whole
    return found, torch.pow(2.0, exponents)
