"""The one problem behind every method: the best rank-r product in a pair of metrics.

    minimise  tr( L (W - BA) R (W - BA)^T )        L: out x out,  R: in x in,  symmetric, >= 0

With M = L^1/2 W R^1/2 and its singular values s, the least that rank r can reach is the sum of s_j^2 over j > r
(Eckart and Young, 1936, for M). Neither a full SVD nor a root or inverse of a metric is needed. Say W is tall (wide
is the mirror image) and P = W^T L W, its Gram matrix on the smaller side as the output metric sees it. With any root
P = T T^T, the eigenvalues of T^T R T are the s_j^2, and with its eigenvectors Z the rows of A are the leading columns
of T Z. B is the least-squares partner of A, W R A^T (A R A^T)^-1, which does not depend on L. Without R (plain SVD)
the eigenvectors of P themselves are the rows of A. Both metrics may be singular.

Squaring halves the digits. Without metrics, float32 stays within 1e-6 of the optimum while sigma_1 / sigma_r is below
50; beyond that Gram matrix and eigen-decomposition are redone in float64, which holds to ratios of 1e8. With metrics,
whose range is that of activations with outliers, everything is float64. Where that is slow, ``linalg/levels.py`` and
``linalg/products.py`` stand in for it; products of slices hold to ratios of 1e6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.linalg import lapack
from svdconvert.linalg.bases import Rounding
from svdconvert.linalg.gram import eigenvectors, gram_matrix, root_of
from svdconvert.linalg.levels import decompose_in_levels
from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.partner import plain_partner
from svdconvert.linalg.precision import (
    CANCELLATION,
    FLOAT32_SCALES,
    check_entries,
    float32_is_enough,
    largest_entry,
    least_tail,
    refuse_overflowing_factor,
    scale_of,
)
from svdconvert.linalg.products import product
from svdconvert.linalg.rates import has_slow_float64
from svdconvert.linalg.residual import left_over, relative, residual
from svdconvert.linalg.results import SINGULAR, Decomposition, Factors


def factorize(
    weight: Tensor,
    rank: int,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    left: Metric = None,
    right: Metric = None,
) -> Factors:
    """Best rank-r approximation of a matrix, as two balanced factors.

    Args:
        weight: [m, n], any floating type, on the device that is to do the work.
        rank: 1 <= rank <= min(m, n).
        dtype: storage type of the factors.
        workspace: buffers to reuse between calls.
        left: metric on the outputs: [m, m], its diagonal [m], or None for the identity.
        right: metric on the inputs: [n, n], its diagonal [n], or None.

    Raises:
        InputError: the matrix has NaN or infinite entries, or the factors do not fit the storage type.
    """
    work = workspace or Workspace()
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise InputError(f"rank {rank} is impossible for a {m} x {n} matrix")
    plain = left is None and right is None
    # in a metric, the loss of rounded factors is told from all vectors
    found = decompose(weight, work, left, right, rank=rank if plain else None)
    return truncate(weight, found, rank, dtype, work, left, right)


def decompose(
    weight: Tensor,
    workspace: Workspace | None = None,
    left: Metric = None,
    right: Metric = None,
    *,
    rank: int | None = None,
) -> Decomposition:
    """Squared singular values of L^1/2 W R^1/2 and the directions that go with them.

    Args:
        weight, left, right: see :func:`factorize`.
        workspace: its buffers hold the result until it is used again.
        rank: for plain SVD, the highest rank that will be asked for; decides on float64, and spares the work for the
            vectors beyond it. None means all, which rounding in metrics needs.

    Raises:
        InputError: the matrix has NaN or infinite entries.
    """
    work = workspace or Workspace()
    if left is None and right is None:
        matrix = Scaled(weight, scale_of(largest_entry(weight)), work)
        return decompose_plain(partial(gram_matrix, matrix, None), matrix.scale, work, rank)
    check_entries(weight)  # float64 needs no scaling
    matrix = Scaled(weight, 1.0, work)
    outer, inner = (left, right) if matrix.tall else (right, left)
    if has_slow_float64(weight.device):
        found = decompose_in_levels(weight, left, right, work)
        if found is not None:
            return found
    return decompose_gram(gram_matrix(matrix, outer, torch.float64), inner, work)


def decompose_plain(
    gram: Callable[[torch.dtype], Tensor], scale: float, work: Workspace, rank: int | None
) -> Decomposition:
    """The same without metrics.

    Args:
        gram: a type -> lower triangle of W^T W if W is tall, of W W^T if it is wide, in it; overwritten. It is asked
            for once, or in float32 and then in float64.
        scale: what W was multiplied with.
        work: its buffers hold the result until it is used again.
        rank: see :func:`decompose`.
    """
    least, greatest = FLOAT32_SCALES
    for dtype in (torch.float32, torch.float64) if least <= scale <= greatest else (torch.float64,):
        values, vectors = eigenvectors(gram(dtype), work, rank)
        highest, count = float(values[-1]), rank or len(values)
        resolved = count == len(values) or float(values[:-count].sum()) >= least_tail(len(values), highest)
        if resolved and float32_is_enough(highest, float(values[-count])):
            break
    return Decomposition(values, vectors, scale)


def decompose_gram(gram: Tensor, inner: Metric, work: Workspace) -> Decomposition:
    """The same from what metrics leave of a matrix.

    Args:
        gram: lower triangle of W^T L W if W is tall, of W R W^T if it is wide, [k, k] float64; overwritten.
        inner: the metric on the smaller side.
        work: its buffers hold the result until it is used again.
    """
    if inner is None:
        return Decomposition(*eigenvectors(gram, work, None))
    root, triangular = root_of(gram)
    if gram.device.type == "cpu" and triangular and inner.dim() == 2:
        weighted = work.take("weighted", tuple(gram.shape), gram.dtype, gram.device).copy_(inner)
        lapack.congruence(weighted, root)
        values, vectors = eigenvectors(weighted, work, None)
        lapack.multiply_rows(root, vectors.T)
        return Decomposition(values, vectors)
    weighted = product(root.T, apply_metric(inner, root))
    values, vectors = eigenvectors(weighted, work, None)
    return Decomposition(values, product(root, vectors))


def truncate(
    weight: Tensor,
    found: Decomposition,
    rank: int,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    left: Metric = None,
    right: Metric = None,
) -> Factors:
    """The factors of a decomposition at one rank.

    Every component is shared evenly between both factors, which keeps the intermediate activations within float16's
    range and the factors fit for 4-bit quantisation; without metrics this is (U sqrt(S)) (sqrt(S) V^T). The factor on
    the smaller side is rounded to the storage type first, and the other one solves the least-squares problem for the
    rounded one, so that its rounding is made good. Where rounding to 16 bits still loses much in the metrics, other
    bases of the same product are tried (``linalg/rounding.py``), and the one that loses least is taken.

    Args:
        weight, rank, dtype, workspace: see :func:`factorize`.
        left, right: likewise. Of the one on the longer side the diagonal is enough; the loss is then that of rounding
            errors that are independent of each other.
        found: what :func:`decompose` made of the same matrix and metrics.

    Raises:
        InputError: the factors do not fit the storage type.
    """
    work = workspace or Workspace()
    kept = min(rank, found.resolved)
    if kept == 0:
        return _of_nothing(weight, found, rank, dtype, work)
    if kept < rank:
        return _padded(truncate(weight, found, kept, dtype, work, left, right), rank)
    matrix = Scaled(weight, found.scale, work)
    outer, inner = (left, right) if matrix.tall else (right, left)
    total = float(found.values.clamp_min(0).sum())
    tail = found.tail(rank)

    if left is None and right is None:
        basis = found.basis[:, -rank:].flip(1)  # orthonormal, and the partner's columns will have length sigma
        if tail < CANCELLATION[basis.dtype] * total and rank < found.values.numel():
            tail = left_over(matrix, basis)
        lengths = found.values[-rank:].flip(0).sqrt().to(basis.dtype)
        # Half of the scale belongs to each factor. It is a power of four, so that taking it off and on is exact.
        half = math.sqrt(matrix.scale)
        small = (basis * lengths.sqrt() / half).to(dtype)
        refuse_overflowing_factor(small)
        large, loss = plain_partner(matrix, small.to(basis.dtype) * half, half, dtype, total)
        plain, energy, name = loss, total, SINGULAR
    else:
        chosen = Rounding(matrix, found, rank, dtype, outer, inner).best()
        small, large, loss, name = chosen.small, chosen.large, chosen.loss, chosen.basis
        plain, energy = residual(matrix, small.double(), large, 1.0)
    refuse_overflowing_factor(large)
    tail = min(tail, loss)  # of two sums that say the same but for their last digits
    return Factors(
        down=small.T.contiguous() if matrix.tall else large,
        up=large if matrix.tall else small,
        relative_error=relative(plain, energy),
        optimal_error=relative(tail, total),
        metric_error=relative(loss, total),
        metric_loss=loss / matrix.scale**2,
        rounding_excess=(loss - tail) / tail if tail > 0 else None,
        basis=name,
        precision=found.precision,
    )


def _of_nothing(weight: Tensor, found: Decomposition, rank: int, dtype: torch.dtype, work: Workspace) -> Factors:
    """Factors of a matrix of zeros, or of one that the metrics see nothing of: there any product loses nothing, and
    that which is best without metrics is taken."""
    if bool(weight.any()):
        plain = factorize(weight, rank, dtype, work)
        return replace(plain, optimal_error=0.0, metric_error=0.0, metric_loss=0.0, rounding_excess=None)
    (m, n), device = weight.shape, weight.device
    down, up = torch.zeros(rank, n, dtype=dtype, device=device), torch.zeros(m, rank, dtype=dtype, device=device)
    return Factors(down, up, 0.0, 0.0, 0.0, 0.0, None, SINGULAR, found.precision)


def _padded(factors: Factors, rank: int) -> Factors:
    """The same product at a higher rank."""
    more = rank - factors.down.shape[0]
    down, up = torch.nn.functional.pad(factors.down, (0, 0, 0, more)), torch.nn.functional.pad(factors.up, (0, more))
    return replace(factors, down=down, up=up, optimal_error=0.0, rounding_excess=None)
