"""Exact truncated SVD of one matrix, without ever computing a full SVD.

The r leading singular vectors of one side are the leading eigenvectors of the smaller Gram matrix, W^T W or W W^T;
the other factor follows by least squares. By Eckart and Young (1936) the product is the best rank-r approximation in
the Frobenius norm, and its error is the root of the sum of the squared singular values that were cut off.

Squaring halves the digits: in float32 the result is within 1e-6 of the optimum while sigma_1 / sigma_r stays below
50; beyond that the Gram matrix and the eigen-decomposition are redone in float64, which holds to ratios of 1e8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdconvert.errors import InputError

# float32 is good while lambda_1 <= this * lambda_r, that is sigma_1 / sigma_r <= 50.
FLOAT32_EIGENVALUE_RATIO = 2.5e3

# Rows (or columns) of W that are brought to the working type at a time: large enough for a full-speed product, small
# enough that the copy stays far below the matrix's own size.
PANEL = 1024

# Below this squared relative error, total minus captured energy loses its digits; the residual is then formed.
CANCELLATION = 1e-3


@dataclass(frozen=True)
class Factors:
    """A rank-r factorization W ~ up @ down.

    Attributes:
        down: [r, n], the first linear layer's weight.
        up: [m, r], the second one's.
        relative_error: ||W - up @ down||_F / ||W||_F of the factors as they are stored.
        optimal_error: the same of the best rank-r approximation (Eckart-Young).
        precision: ``float32`` or ``float64``, what the eigenproblem was solved in.
    """

    down: Tensor
    up: Tensor
    relative_error: float
    optimal_error: float
    precision: str


@dataclass
class Workspace:
    """Buffers that are used again for every matrix.

    Fresh memory costs a page fault every 4 KiB, on virtual machines more than the arithmetic of a small matrix.
    """

    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; what an earlier call of the same name returned is overwritten."""
        need = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < need or buffer.device != device:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(need, dtype=torch.uint8, device=device)
        return buffer[:need].view(dtype).view(shape)


def factorize(weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace | None = None) -> Factors:
    """Best rank-r approximation of a matrix, as two balanced factors.

    The singular values are shared evenly, W ~ (U sqrt(S)) (sqrt(S) V^T): both factors then have the same norm, which
    keeps the intermediate activations within float16's range and the factors fit for 4-bit quantisation. The factor
    on the smaller side is rounded to the storage type first, and the other one solves the least-squares problem for
    the rounded one, so that its rounding is made good.

    Args:
        weight: [m, n], any floating type, on the device that is to do the work.
        rank: 1 <= rank <= min(m, n).
        dtype: storage type of the factors.
        workspace: buffers to reuse between calls.

    Raises:
        InputError: the matrix has NaN or infinite entries, or the factors do not fit the storage type.
    """
    work = workspace or Workspace()
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise InputError(f"rank {rank} is impossible for a {m} x {n} matrix")
    scaled = _Scaled(weight, _scale(weight), work)
    values, basis, precision = _leading_eigenvectors(scaled, rank)
    kept, total = values[-rank:].clamp_min(0).flip(0), float(values.clamp_min(0).sum())
    tail = float(values[:-rank].clamp_min(0).sum()) if rank < min(m, n) else 0.0

    # Half of the scale belongs to each factor. It is a power of four, so that taking it off and on is exact.
    half = math.sqrt(scaled.scale)
    small = (basis[:, -rank:].flip(1) * kept.sqrt().sqrt().to(basis.dtype) / half).to(dtype)
    _refuse_overflow(small)
    lifted = small.to(basis.dtype) * half
    other = _least_squares_partner(scaled, lifted)
    large = (other / half).to(dtype)
    _refuse_overflow(large)
    tall = m >= n
    return Factors(
        down=small.T.contiguous() if tall else large,
        up=large if tall else small,
        relative_error=_stored_error(scaled, lifted, large.to(other.dtype) * half, other, total),
        optimal_error=math.sqrt(tail / total) if total > 0 else 0.0,
        precision=precision,
    )


def _scale(weight: Tensor) -> float:
    """A factor that keeps the squares of all entries inside float32's range; 1 for ordinary weights."""
    low, high = torch.aminmax(weight)  # NaN wins in both
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest):
        raise InputError("it has NaN or infinite entries")
    if largest == 0 or 2**-12 <= largest <= 2**12:
        return 1.0
    return 4.0 ** -math.floor(math.log2(largest) / 2)


def _refuse_overflow(factor: Tensor) -> None:
    if not bool(torch.isfinite(factor).all()):
        raise InputError(f"its factors exceed the range of {str(factor.dtype)[6:]}; choose --dtype bfloat16 or float32")


@dataclass(frozen=True)
class _Scaled:
    """A matrix times a power of four, brought to a working type piece by piece."""

    weight: Tensor
    scale: float
    work: Workspace

    @property
    def tall(self) -> bool:
        return self.weight.shape[0] >= self.weight.shape[1]

    def panels(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Pieces along the longer side: [p, n] if tall, [m, p] if wide. Each is valid until the next."""
        length = max(self.weight.shape)
        for start in range(0, length, PANEL):
            part = slice(start, min(start + PANEL, length))
            piece = self.weight[part] if self.tall else self.weight[:, part]
            if piece.dtype != dtype or self.scale != 1:
                buffer = self.work.take("panel", tuple(piece.shape), dtype, piece.device)
                piece = buffer.copy_(piece)
                if self.scale != 1:
                    piece.mul_(self.scale)
            yield part, piece


def _leading_eigenvectors(matrix: _Scaled, rank: int) -> tuple[Tensor, Tensor, str]:
    """Eigenvalues (ascending, float64) and eigenvectors (columns) of the smaller Gram matrix."""
    for dtype in (torch.float32, torch.float64):
        gram = _gram(matrix, dtype)
        k = gram.shape[0]
        values = torch.empty(k, dtype=dtype, device=gram.device)
        vectors = matrix.work.take("eigenvectors", (k, k), dtype, gram.device).T  # LAPACK writes columns
        torch.linalg.eigh(gram, UPLO="L", out=(values, vectors))
        values = values.double()
        largest, smallest = float(values[-1]), float(values[-rank])
        if largest <= FLOAT32_EIGENVALUE_RATIO * smallest or largest == 0:
            break
    return values, vectors, str(vectors.dtype)[6:]


def _gram(matrix: _Scaled, dtype: torch.dtype) -> Tensor:
    """Lower triangle of W^T W, or of W W^T where that is smaller: [k, k].

    Computed in block columns from the diagonal down, which spares 7/16 of the arithmetic of the full product.
    """
    k = min(matrix.weight.shape)
    gram = matrix.work.take("gram", (k, k), dtype, matrix.weight.device).zero_()
    width = max(k // 8, 256)
    for _, piece in matrix.panels(dtype):
        rows = piece if matrix.tall else piece.T  # [p, k]
        for start in range(0, k, width):
            stop = min(start + width, k)
            gram[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])
    return gram


def _least_squares_partner(matrix: _Scaled, small: Tensor) -> Tensor:
    """The factor that goes best with a given one.

    Args:
        matrix: W, [m, n].
        small: [k, r], the factor on the smaller side (of n if tall, of m if wide), already rounded.

    Returns:
        [m, r] if tall, for W ~ other small^T; [r, n] if wide, for W ~ small other. Columns of zeros in ``small`` give
        zeros.
    """
    m, n = matrix.weight.shape
    norms = torch.linalg.vector_norm(small, dim=0)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(small.dtype).tiny), 0)
    unit = small * inverse
    overlap = unit.T @ unit  # the identity but for the rounding of `small`
    overlap.diagonal().copy_(torch.where(norms > 0, overlap.diagonal(), 1))
    root, failed = torch.linalg.cholesky_ex(overlap)
    if int(failed):  # rounding made columns of a rank-deficient matrix dependent
        pseudo_inverse = (torch.linalg.pinv(overlap, hermitian=True) @ unit.T) * inverse[:, None]
    else:
        pseudo_inverse = torch.cholesky_solve(unit.T, root) * inverse[:, None]
    rank = small.shape[1]
    other = torch.empty((m, rank) if matrix.tall else (rank, n), dtype=small.dtype, device=small.device)
    for part, piece in matrix.panels(small.dtype):
        if matrix.tall:
            torch.mm(piece, pseudo_inverse.T, out=other[part])
        else:
            other[:, part] = pseudo_inverse @ piece
    return other


def _stored_error(matrix: _Scaled, small: Tensor, large: Tensor, other: Tensor, energy: float) -> float:
    """Relative Frobenius error of the rounded factors.

    ``other`` solves the normal equations, so the residual is orthogonal to ``small`` and the squared error is the
    energy of W, minus what the product captures, plus what rounding ``other`` to ``large`` adds.
    """
    if energy == 0:
        return 0.0
    tall = matrix.tall
    gram = small.T @ small

    def product_energy(factor: Tensor) -> float:
        return float((((factor @ gram) if tall else (gram @ factor)) * factor).sum(dtype=torch.float64))

    squared = (energy - product_energy(other) + product_energy(large - other)) / energy
    if squared < CANCELLATION:
        residual = 0.0
        for part, piece in matrix.panels(small.dtype):
            product = large[part] @ small.T if tall else small @ large[:, part]
            residual += float(torch.linalg.vector_norm(piece - product)) ** 2
        squared = residual / energy
    return math.sqrt(max(squared, 0.0))
