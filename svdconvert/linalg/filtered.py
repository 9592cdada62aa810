"""A rank-r factorization that is not exact: a Chebyshev-filtered subspace of the Gram matrix, and how far it is off.

What the exact solver spends on all eigenvectors of a k x k Gram matrix goes into a few products of that matrix with a
block a little wider than the rank (Zhou, Saad, Tiago and Chelikowsky, 2006, "Self-consistent-field calculations using
Chebyshev-filtered subspace iteration"). Everything is float32; the Gram matrix, the partner and the balancing are the
exact solver's own. Where it pays is said in ``solvers/fast.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from svdconvert.linalg.exact import factorize, truncate
from svdconvert.linalg.gram import plain_gram
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.precision import CANCELLATION, float32_is_enough
from svdconvert.linalg.results import Decomposition, Factors

# The most by which the error of a certified product may exceed the optimum, relative to it.
BOUND = 1e-3

# Columns of the block beyond the rank: the distance of the wanted values from those left out sets the convergence.
EXTRA_SHARE, EXTRA_LEAST = 0.25, 32

# Degree of the filter, for blocks of at least this share of k. Where few are wanted, their values lie close together.
DEGREES = ((1 / 5, 4), (1 / 10, 5), (0.0, 6))

# What is missed is mostly missed by little: further filters, which know better where the unwanted part ends, are short.
PASSES, DEGREE_AGAIN = 3, 2

# Cholesky's QR takes condition numbers up to the root of 1 / eps; columns are made orthonormal before they get there.
GROWTH = 1e3

# The first-order estimate was 0.65 to 0.95 of the true excess on the spectra of ``geometry``, ranks 64 to 512 of 2048.
SAFETY = 2.0


def factorize_fast(weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace | None = None) -> Factors:
    """:func:`filtered_factors`, or the best product where that gives nothing.

    Args:
        weight, rank, dtype, workspace: see :func:`svdconvert.linalg.exact.factorize`.

    Raises:
        InputError: the matrix has NaN or infinite entries, or the factors do not fit the storage type.
    """
    work = workspace or Workspace()
    return filtered_factors(weight, rank, dtype, work) or factorize(weight, rank, dtype, work)


def filtered_factors(
    weight: Tensor,
    rank: int,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    *,
    degree: int = 0,
    passes: int = PASSES,
) -> Factors | None:
    """Nearly the best rank-r product, with an estimate of how near, or nothing.

    The same matrix gives the same factors: the start is the same for all matrices of a size.

    Args:
        weight: [m, n], any floating type, on the device that is to do the work.
        rank: 1 <= rank <= min(m, n).
        dtype: storage type of the factors.
        workspace: buffers to reuse between calls.
        degree: of the first filter; 0 leaves it to ``DEGREES``.
        passes: how many filters may be tried.

    Returns:
        The factors, with a certificate of at most ``BOUND``: by how much ||W - product||_F exceeds the Eckart-Young
        optimum before rounding, relative to it, twice a first-order estimate. None where that was not reached, or
        float32 is not good enough, or the rank is too large for this to make sense: to be done exactly.

    Raises:
        InputError: the matrix has NaN or infinite entries, or the factors do not fit the storage type.
    """
    work = workspace or Workspace()
    k = min(weight.shape)
    block = rank + max(EXTRA_LEAST, int(rank * EXTRA_SHARE))
    lower, scale = plain_gram(weight, work)
    if 2 * block > k:
        return None
    gram = _whole(lower)
    found = _subspace(gram, rank, block, degree or next(d for share, d in DEGREES if block >= share * k), passes)
    if found is None:
        return None
    top, basis, certificate = found
    # Only the sum of the values that were not computed is known, and only their sum is used.
    rest = (float(gram.diagonal().sum(dtype=torch.float64)) - float(top.sum())) / (k - rank)
    values = torch.cat([top.new_full((k - rank,), rest), top])
    factors = truncate(weight, Decomposition(values, basis, scale), rank, dtype, work)
    return replace(factors, optimal_error=factors.optimal_error / (1 + certificate), certificate=certificate)


def excess_estimate(top: Tensor, residuals: Tensor, floor: float, tail: float) -> float:
    """Relative excess of ||W - W Q Q^T||_F that the residuals of Ritz pairs let one expect.

    A vector q with value t and residual e takes from its eigenvalue what the 2 x 2 matrix [[t, |e|], [|e|, floor]] has
    above t: |e|^2 / (t - floor) for a small residual, never more than |e| (Parlett, The Symmetric Eigenvalue Problem,
    11.5 and 11.7, for one vector). That the rest of the spectrum lies below ``floor`` is not known; hence an estimate.

    Args:
        top: [r] float64, the Ritz values.
        residuals: [r] float64, |G q - t q|^2.
        floor: the smallest Ritz value of the block.
        tail: sum of all eigenvalues but ``top``: the squared error of the product.

    Returns:
        Infinity where nothing can be said.
    """
    gap = (top - floor).clamp_min(0)
    missed = 2 * residuals / (gap + (gap.square() + 4 * residuals).sqrt()).clamp_min(torch.finfo(top.dtype).tiny)
    best = tail - float(missed.sum())
    return math.sqrt(tail / best) - 1 if best > 0 else math.inf


def _subspace(gram: Tensor, rank: int, block: int, degree: int, passes: int) -> tuple[Tensor, Tensor, float] | None:
    """Ritz values [r] (ascending, float64), vectors [k, r] and the certificate; None where it is above the bound."""
    total = float(gram.diagonal().sum(dtype=torch.float64))
    if not math.isfinite(total):  # the power of four for the smallest of denormal entries leaves float32's range
        return None
    generator = torch.Generator(gram.device).manual_seed(0)  # the same bytes for the same matrix
    start = gram @ torch.randn(gram.shape[0], block, generator=generator, device=gram.device)
    basis = _orthonormal(start)[0]
    image = gram @ basis
    projected = basis.T @ image
    ritz = torch.linalg.eigvalsh((projected + projected.T) / 2)
    # After one product the smallest wanted value comes out too low by up to a half and more.
    if not (float(ritz[-1]) > 0 and float32_is_enough(float(ritz[-1]), 4 * float(ritz[-rank]))):
        return None
    # Ritz values lie below the eigenvalues of the same number: nothing that is wanted is damped.
    bound = float(ritz[-rank])
    for _ in range(passes):
        basis = _filter(gram, basis, image, bound, float(ritz[-1]), degree)
        basis = _orthonormal(_orthonormal(basis)[0])[0]
        image = gram @ basis
        projected = basis.T @ image
        ritz, rotation = torch.linalg.eigh((projected + projected.T) / 2)
        if not (float(ritz[-1]) > 0 and float32_is_enough(float(ritz[-1]), float(ritz[-rank]))):
            return None
        leading = rotation[:, -rank:]
        vectors, top = basis @ leading, ritz[-rank:].double()
        residuals = (image @ leading).addcmul_(vectors, ritz[-rank:], value=-1).square_().sum(dim=0).double()
        tail = total - float(top.sum())
        if tail <= CANCELLATION[torch.float32] * total:
            return None
        certificate = SAFETY * excess_estimate(top, residuals, float(ritz[0]), tail)
        if certificate <= BOUND:
            return top, vectors, certificate
        # Now that they are near: below a gap after the last wanted value, that one stands out.
        bound, degree = float(ritz[-rank] + ritz[0].clamp_min(0)) / 2, DEGREE_AGAIN
    return None


def _filter(gram: Tensor, basis: Tensor, image: Tensor, bound: float, largest: float, degree: int) -> Tensor:
    """Chebyshev's polynomial of the Gram matrix, small on [0, bound], times a basis, [k, l].

    A change of basis from the right, made to both blocks of the three-term recurrence, leaves it valid.

    Args:
        gram: [k, k].
        basis: orthonormal columns.
        image: gram @ basis.
        bound: where the unwanted part of the spectrum ends.
        largest: about the largest eigenvalue.
        degree: of the polynomial.
    """
    half = bound / 2
    step = 2 * (largest / half - 1)
    before, now, growth = basis, image / half - basis, step / 2
    for _ in range(degree - 1):
        if growth * step > GROWTH:
            now, before = _orthonormal(now, before)
            growth = 1.0
        before.addmm_(gram, now, beta=-1, alpha=2 / half).sub_(now, alpha=2)
        before, now, growth = now, before, growth * step
    return now


def _orthonormal(columns: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Columns X R^-1 that are nearly orthonormal, and other blocks times the same R^-1.

    Cholesky's QR (Yamamoto and others, 2015, "Roundoff error analysis of the CholeskyQR2 algorithm"); done twice it is
    as good as Householder's, which takes its place where the columns are too close to dependent for it.
    """
    lengths = torch.linalg.vector_norm(columns, dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    scaled = columns / lengths
    root, failed = torch.linalg.cholesky_ex(scaled.T @ scaled)
    if int(failed):
        orthonormal, upper = torch.linalg.qr(scaled)
    else:
        upper = root.T
        orthonormal = torch.linalg.solve_triangular(upper, scaled, upper=True, left=False)
    rest = (torch.linalg.solve_triangular(upper, other / lengths, upper=True, left=False) for other in others)
    return orthonormal, *rest


def _whole(gram: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle, in place."""
    k = gram.shape[0]
    for start in range(0, k, 512):
        stop = min(start + 512, k)
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        gram[start:stop, stop:] = gram[stop:, start:stop].T
    return gram
