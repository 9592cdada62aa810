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
whose range is that of activations with outliers, everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.linalg import lapack
from svdconvert.linalg.rounding import BASES, SMALLEST_SHARE, round_with_feedback
from svdconvert.sentences import asked

# float32 is good while lambda_1 <= this * lambda_r, that is sigma_1 / sigma_r <= 50.
FLOAT32_EIGENVALUE_RATIO = 2.5e3

# Rows (or columns) of W that are brought to the working type at a time: large enough for a full-speed product, small
# enough that the copy stays far below the matrix's own size.
PANEL = 1024

# Below this squared relative error, total minus captured energy loses its digits; the residual is then formed.
CANCELLATION = {torch.float32: 1e-3, torch.float64: 1e-9}

# Entries whose squares, times those of a metric, stay far inside float64's range. No other type holds others.
LEAST_ENTRY, GREATEST_ENTRY = 1e-100, 1e100

# Powers of four that a float32 matrix can be multiplied with.
FLOAT32_SCALES = (4.0**-63, 4.0**63)

# A share of the truncation's own loss that rounding may add without other bases being tried.
NEGLIGIBLE_EXCESS = 1e-4

SINGULAR = "singular vectors"

# Identity, the diagonal of a diagonal metric, or a symmetric positive semi-definite matrix.
Metric = Tensor | None


@dataclass(frozen=True)
class Factors:
    """A rank-r factorization W ~ up @ down.

    Components that rounding cannot tell from nothing are zeros in both factors, the last ones.

    Attributes:
        down: [r, n], the first linear layer's weight.
        up: [m, r], the second one's.
        relative_error: ||W - up @ down||_F / ||W||_F of the factors as they are stored.
        optimal_error: the relative error, in the metrics, of the best rank-r product; with a certificate the least
            that it can be by that. Components that are not :attr:`Decomposition.resolved` count as nothing in metrics,
            and where the rank is above their number.
        metric_error: the relative error, in the metrics, of the factors as they are stored.
        metric_loss: the square of the same, not relative: tr(L E R E^T) with E = W - up @ down.
        rounding_excess: what the storage type adds to the loss in the metrics, relative to that of the product before
            rounding; None where that one loses nothing.
        basis: ``singular vectors``, or the name of a row of :data:`svdconvert.linalg.rounding.BASES`.
        precision: ``float32`` or ``float64``, what the eigenproblem was solved in.
        certificate: what the error of the product before rounding is estimated to be above the least possible one at
            most, relative to it (``linalg/filtered.py``); None for the best product.
    """

    down: Tensor
    up: Tensor
    relative_error: float
    optimal_error: float
    metric_error: float
    metric_loss: float
    rounding_excess: float | None
    basis: str
    precision: str
    certificate: float | None = None


@dataclass(frozen=True)
class Decomposition:
    """What a truncation at any rank needs, computed once.

    Attributes:
        values: [k] float64, ascending: squared singular values of L^1/2 W R^1/2, k = min(m, n).
        basis: [k, c], the last column belongs to the last value, and so on: a row of `down` if W is tall, a column of
            `up` if it is wide, up to its length. c is k, or the highest rank that was asked for.
        scale: power of four that the matrix was multiplied with; `values` and `basis` are of the scaled matrix.
    """

    values: Tensor
    basis: Tensor
    scale: float = 1.0

    @property
    def resolved(self) -> int:
        """How many values are more than what rounding leaves of zeros, k eps times the largest.

        Matrices of exactly low rank left up to 0.04 k eps. What float32 was enough for is far above.
        """
        least = self.values.numel() * torch.finfo(torch.float64).eps * float(self.values[-1])
        return int((self.values > max(least, 0.0)).sum())

    def tail(self, rank: int) -> float:
        """What rank r loses, the sum of the resolved values beyond it, of the scaled matrix."""
        beyond = self.values[self.values.numel() - self.resolved : -rank]
        return float(beyond.sum())

    @property
    def spectrum(self) -> Tensor:
        """[k] float64, descending: the squared singular values of the matrix itself; their tails are losses."""
        return self.values.clamp_min(0).flip(0) / self.scale**2


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
        matrix = _Scaled(weight, scale_of(largest_entry(weight)), work)
        least, greatest = FLOAT32_SCALES
        for dtype in (torch.float32, torch.float64) if least <= matrix.scale <= greatest else (torch.float64,):
            values, vectors = _eigenvectors(_gram(matrix, None, dtype), work, rank)
            highest, count = float(values[-1]), rank or len(values)
            resolved = count == len(values) or float(values[:-count].sum()) >= least_tail(len(values), highest)
            if resolved and float32_is_enough(highest, float(values[-count])):
                break
        return Decomposition(values, vectors, matrix.scale)
    check_entries(weight)  # float64 needs no scaling
    matrix = _Scaled(weight, 1.0, work)
    outer, inner = (left, right) if matrix.tall else (right, left)
    return decompose_gram(_gram(matrix, outer, torch.float64), inner, work)


def plain_gram(weight: Tensor, workspace: Workspace) -> tuple[Tensor, float]:
    """The Gram matrix on the smaller side in float32, of the matrix times a power of four.

    Args:
        weight: [m, n], any floating type.
        workspace: its buffers hold the result until it is used again.

    Returns:
        ``(gram, scale)``: [k, k], of which the lower triangle counts; and the power.

    Raises:
        InputError: the matrix has NaN or infinite entries.
    """
    matrix = _Scaled(weight, scale_of(largest_entry(weight)), workspace)
    return _gram(matrix, None, torch.float32), matrix.scale


def decompose_gram(gram: Tensor, inner: Metric, work: Workspace) -> Decomposition:
    """The same from what metrics leave of a matrix.

    Args:
        gram: lower triangle of W^T L W if W is tall, of W R W^T if it is wide, [k, k] float64; overwritten.
        inner: the metric on the smaller side.
        work: its buffers hold the result until it is used again.
    """
    if inner is None:
        return Decomposition(*_eigenvectors(gram, work, None))
    root, triangular = _root(gram)
    if gram.device.type == "cpu" and triangular and inner.dim() == 2:
        weighted = work.take("weighted", tuple(gram.shape), gram.dtype, gram.device).copy_(inner)
        lapack.congruence(weighted, root)
        values, vectors = _eigenvectors(weighted, work, None)
        lapack.multiply_rows(root, vectors.T)
        return Decomposition(values, vectors)
    weighted = root.T @ apply_metric(inner, root)
    values, vectors = _eigenvectors(weighted, work, None)
    return Decomposition(values, root @ vectors)


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
    matrix = _Scaled(weight, found.scale, work)
    outer, inner = (left, right) if matrix.tall else (right, left)
    total = float(found.values.clamp_min(0).sum())
    tail = found.tail(rank)

    if left is None and right is None:
        basis = found.basis[:, -rank:].flip(1)  # orthonormal, and the partner's columns will have length sigma
        if tail < CANCELLATION[basis.dtype] * total and rank < found.values.numel():
            tail = _left_over(matrix, basis)
        lengths = found.values[-rank:].flip(0).sqrt().to(basis.dtype)
        # Half of the scale belongs to each factor. It is a power of four, so that taking it off and on is exact.
        half = math.sqrt(matrix.scale)
        small = (basis * lengths.sqrt() / half).to(dtype)
        refuse_overflow(small)
        large, loss = _plain_partner(matrix, small.to(basis.dtype) * half, half, dtype, total)
        plain, energy, name = loss, total, SINGULAR
    else:
        chosen = _Rounding(matrix, found, rank, dtype, outer, inner).best()
        small, large, loss, name = chosen.small, chosen.large, chosen.loss, chosen.basis
        plain, energy = _residual(matrix, small.double(), large, 1.0)
    refuse_overflow(large)
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
        precision=str(found.basis.dtype)[6:],
    )


def _of_nothing(weight: Tensor, found: Decomposition, rank: int, dtype: torch.dtype, work: Workspace) -> Factors:
    """Factors of a matrix of zeros, or of one that the metrics see nothing of: there any product loses nothing, and
    that which is best without metrics is taken."""
    if bool(weight.any()):
        plain = factorize(weight, rank, dtype, work)
        return replace(plain, optimal_error=0.0, metric_error=0.0, metric_loss=0.0, rounding_excess=None)
    (m, n), device = weight.shape, weight.device
    down, up = torch.zeros(rank, n, dtype=dtype, device=device), torch.zeros(m, rank, dtype=dtype, device=device)
    return Factors(down, up, 0.0, 0.0, 0.0, 0.0, None, SINGULAR, str(found.basis.dtype)[6:])


def _padded(factors: Factors, rank: int) -> Factors:
    """The same product at a higher rank."""
    more = rank - factors.down.shape[0]
    down, up = torch.nn.functional.pad(factors.down, (0, 0, 0, more)), torch.nn.functional.pad(factors.up, (0, more))
    return replace(factors, down=down, up=up, optimal_error=0.0, rounding_excess=None)


def output_losses(weight: Tensor, found: Decomposition, left: Metric, right: Metric, gram: Tensor) -> Tensor:
    """Mean squared error of a layer's outputs at every rank, tr(E C E^T) with E = W - up @ down, before rounding.

    The products of a decomposition are nested: with S its basis and Y = M S (S^T M S)^-1, M the metric on the smaller
    side, rank r is W Y_r S_r^T if W is tall and S_r Y_r^T W if it is wide. All ranks then cost four products of the
    smaller side's size, and what is below that where C is the method's own metric on the inputs.

    Args:
        weight, left, right: see :func:`factorize`.
        found: what :func:`decompose` made of them.
        gram: C = E[x x^T] of the layer's inputs, [n, n] float64; ``right`` itself where that is C.

    Returns:
        [k + 1] float64, element r for rank r: element 0 is tr(W C W^T). Directions whose weight in the metrics is lost
        in rounding count as unused.
    """
    same = gram is right
    if same and left is None:
        return torch.cat([found.spectrum.flip(0).cumsum(0).flip(0), found.spectrum.new_zeros(1)])
    matrix = _Scaled(weight, 1.0, Workspace())  # one of its own: the basis may lie in the caller's
    basis = found.basis.flip(1).double()
    seen = apply_metric(right if matrix.tall else left, basis)
    lengths = (basis * seen).sum(dim=0)
    used = lengths > torch.finfo(torch.float64).eps * lengths.numel() * lengths.max()
    if same and not matrix.tall:  # with W R W^T = T T^T and S = T Z, Z orthogonal: Y^T W R W^T Y = 1
        captured = basis.square().sum(dim=0)
        total, gains = captured.sum(), captured * used
    else:
        partner = torch.where(used, seen / torch.where(used, lengths, 1), 0)
        lower = _gram(matrix, None if matrix.tall else gram, torch.float64)
        other = lower.tril() + lower.tril(-1).T
        through = other @ partner
        if same:  # S^T C S is diagonal
            total, gains = (other * gram).sum(), (seen * through).sum(dim=0)
        else:
            on_basis = gram @ basis if matrix.tall else basis
            total = (other * gram).sum() if matrix.tall else other.trace()
            pairs = (basis.T @ on_basis) * (partner.T @ through)
            gains = 2 * (on_basis * through).sum(dim=0) - 2 * pairs.triu(1).sum(dim=0) - pairs.diagonal()
    return torch.cat([total[None], total - gains.cumsum(0)]).clamp_min(0)


def relative(squared: float, total: float) -> float:
    """The root of a part of a sum of squares over the whole; 0 of nothing."""
    return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0


def largest_entry(weight: Tensor) -> float:
    """The largest absolute entry.

    Raises:
        InputError: it is NaN or infinite, or its square would be too near to the ends of float64's range.
    """
    low, high = torch.aminmax(weight)  # NaN wins in both
    largest = max(abs(float(low)), abs(float(high)))
    if not math.isfinite(largest):
        raise InputError("it has NaN or infinite entries")
    if largest and not LEAST_ENTRY <= largest <= GREATEST_ENTRY:
        raise InputError(
            f"its largest entry is {largest:.1e}, and squares of entries beyond {GREATEST_ENTRY:g} or all below "
            f"{LEAST_ENTRY:g} leave the range of float64; rescale it, or leave it out of {asked('targets')}"
        )
    return largest


def check_entries(weight: Tensor) -> None:
    """Refuse a matrix whose entries cannot be computed with. Raises as :func:`largest_entry`."""
    largest_entry(weight)


def float32_is_enough(highest: float, lowest: float) -> bool:
    """Whether an eigenproblem that was solved in float32 is good, by the highest eigenvalue and the lowest wanted."""
    return highest <= FLOAT32_EIGENVALUE_RATIO * lowest or highest == 0


def least_tail(size: int, highest: float) -> float:
    """What the eigenvalues of a [size, size] problem beyond a rank must add up to for float32 to tell it from nothing.

    Of zeros it left up to 0.15 of this, in exactly low-rank matrices.
    """
    return size * torch.finfo(torch.float32).eps * highest


def scale_of(largest: float) -> float:
    """What a matrix is to be multiplied with, by its largest absolute entry, to keep squares inside float32's range.

    A power of four; 1 for ordinary weights.
    """
    if largest == 0 or 2**-12 <= largest <= 2**12:
        return 1.0
    return 4.0 ** -math.floor(math.log2(largest) / 2)


def refuse_overflow(factor: Tensor) -> None:
    """Raise InputError if a factor has left the range of its type."""
    if not bool(torch.isfinite(factor).all()):
        raise InputError(
            f"its factors exceed the range of {str(factor.dtype)[6:]}; choose {asked('dtype', 'bfloat16')} or float32"
        )


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


def _eigenvectors(gram: Tensor, work: Workspace, count: int | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, float64) and eigenvectors (columns) of a symmetric matrix given by its lower half.

    Args:
        gram: [k, k], contiguous; overwritten.
        work: gets the vectors.
        count: how many vectors, those of the largest values; None means all.
    """
    k = gram.shape[0]
    count = count or k
    vectors = work.take("eigenvectors", (k, k), gram.dtype, gram.device)
    if gram.device.type == "cpu":
        space = work.take("eigenwork", (lapack.work_size(k),), gram.dtype, gram.device)
        values = lapack.top_eigenvectors(gram, count, vectors, space)
    else:
        values = torch.empty(k, dtype=gram.dtype, device=gram.device)
        torch.linalg.eigh(gram, UPLO="L", out=(values, vectors.T))
    return values.double(), vectors[k - count :].T


def _gram(matrix: _Scaled, outer: Metric, dtype: torch.dtype) -> Tensor:
    """Lower triangle of W^T L W if W is tall, of W R W^T if it is wide: [k, k].

    Args:
        matrix: W.
        outer: the metric on the longer side.
        dtype: working type.
    """
    k = min(matrix.weight.shape)
    gram = matrix.work.take("gram", (k, k), dtype, matrix.weight.device).zero_()
    if outer is not None and outer.dim() == 2:
        whole = matrix.weight.to(dtype)
        for part, piece in matrix.panels(dtype):
            block = outer[part].to(dtype)
            if matrix.tall:
                _add_lower(gram, piece.T, block @ whole)
            else:
                _add_lower(gram, whole @ block.T, piece.T)
        return gram
    for part, piece in matrix.panels(dtype):
        if outer is not None:
            roots = outer[part].to(dtype).sqrt()
            piece = piece * (roots[:, None] if matrix.tall else roots)
        if piece.device.type == "cpu":
            lapack.add_gram(piece, gram, transposed=not matrix.tall)
            continue
        rows = piece if matrix.tall else piece.T  # [p, k]
        _add_lower(gram, rows.T, rows)
    return gram


def _add_lower(gram: Tensor, one: Tensor, other: Tensor) -> None:
    """gram += one other, [k, p] times [p, k], in the lower triangle.

    Block columns from the diagonal down spare 7/16 of the arithmetic of the full product. (BLAS' syrk spares half.)
    """
    k = gram.shape[0]
    width = max(k // 8, 256)
    for start in range(0, k, width):
        stop = min(start + width, k)
        gram[start:, start:stop].addmm_(one[start:], other[:, start:stop])


def _root(gram: Tensor) -> tuple[Tensor, bool]:
    """T with T T^T = P, for P given by its lower half: Cholesky's, or by eigenvectors where P is singular.

    A singular P that rounding has made regular is taken for singular: a metric may magnify what is left of its zeros.

    Returns:
        ``(T, whether it is lower triangular)``.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    share = len(gram) * torch.finfo(gram.dtype).eps
    if not int(failed) and bool((factor.diagonal().square() > share * gram.diagonal()).all()):
        return factor.tril().contiguous(), True
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    return vectors * torch.where(values > share * values[-1], values, 0).sqrt(), False


def apply_metric(metric: Metric, columns: Tensor) -> Tensor:
    """Metric times [k, r]."""
    if metric is None:
        return columns
    metric = metric.to(columns.dtype)
    return metric @ columns if metric.dim() == 2 else metric[:, None] * columns


def _partner(matrix: _Scaled, solved: Tensor) -> Tensor:
    """The least-squares partner of a factor; it depends on the metric of that factor's side alone.

    Args:
        matrix: W, [m, n].
        solved: [r, k], the pseudo-inverse of the factor on the smaller side (of n if tall, of m if wide).

    Returns:
        [m, r] if tall, for W ~ other small^T; [r, n] if wide, for W ~ small other. Columns of the factor that the
        metric does not see give zeros.
    """
    m, n = matrix.weight.shape
    rank = solved.shape[0]
    other = torch.empty((m, rank) if matrix.tall else (rank, n), dtype=solved.dtype, device=solved.device)
    for part, piece in matrix.panels(solved.dtype):
        if matrix.tall:
            torch.mm(piece, solved.T, out=other[part])
        else:
            other[:, part] = solved @ piece
    return other


def _pseudo_inverse(small: Tensor, weighted: Tensor) -> Tensor:
    """(S^T M S)^-1 S^T M for a factor S, [k, r], and M S, M the metric on its side: [r, k]."""
    norms = (small * weighted).sum(dim=0).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(small.dtype).tiny), 0)
    # Near the identity: without metrics but for the rounding of `small`, with metrics likewise.
    overlap = (small * inverse).T @ (weighted * inverse)
    overlap.diagonal().copy_(torch.where(norms > 0, overlap.diagonal(), 1))
    root, failed = torch.linalg.cholesky_ex(overlap)
    if int(failed):  # rounding made columns of a rank-deficient matrix dependent
        solved = torch.linalg.pinv(overlap, hermitian=True) @ (weighted * inverse).T
    else:
        solved = torch.cholesky_solve((weighted * inverse).T, root)
    return solved * inverse[:, None]


def _plain_partner(
    matrix: _Scaled, small: Tensor, half: float, dtype: torch.dtype, total: float
) -> tuple[Tensor, float]:
    """The least-squares partner without metrics, rounded panel by panel, so that no float32 copy of it is made.

    Returns:
        ``(large, loss)``: the partner in the storage type, and ||W - product||^2 of the rounded factors.
    """
    m, n = matrix.weight.shape
    rank = small.shape[1]
    solved, gram = _pseudo_inverse(small, small), small.T @ small
    large = torch.empty((m, rank) if matrix.tall else (rank, n), dtype=dtype, device=small.device)
    loss = total
    for part, piece in matrix.panels(small.dtype):
        best = piece @ solved.T if matrix.tall else (solved @ piece).T  # [p, r]
        rounded = (best / half).to(dtype)
        (large[part] if matrix.tall else large[:, part].T).copy_(rounded)
        stored = rounded.to(best.dtype) * half
        # The residual of `best` is orthogonal to `small`: loss = |W|^2 - |best|^2 + |stored - best|^2 in its metric.
        loss += float(((stored @ gram) * (stored - 2 * best)).sum(dtype=torch.float64))
    if loss < CANCELLATION[small.dtype] * total:
        loss = _residual(matrix, small, large, half)[0]
    return large, max(loss, 0.0)


def _left_over(matrix: _Scaled, basis: Tensor) -> float:
    """||W - W V V^T||^2 for orthonormal columns V on the smaller side, [k, r], formed explicitly."""
    rest = 0.0
    for _, piece in matrix.panels(basis.dtype):
        rows = piece if matrix.tall else piece.T
        rest += float(torch.linalg.vector_norm(rows - (rows @ basis) @ basis.T)) ** 2
    return rest


@dataclass(frozen=True)
class _Rounded:
    """Factors in the storage type, [k, r] and [m, r] or [r, n]; their loss in the metrics; the name of their basis."""

    small: Tensor
    large: Tensor
    loss: float
    basis: str


class _Rounding:
    """The ways to round a truncation in a pair of metrics.

    The larger factor solves the normal equations before it is rounded, so that the loss is the sum of two: what the
    rounded smaller factor cannot span, and what rounding the larger one adds. With S the smaller factor at full rank,
    the first is |(1 - Pi) S|^2 in the inner metric, Pi the projection onto the rounded factor. The leading columns'
    part of it is formed, as it is small; that of the others is what the truncation loses less |Pi S|^2 of them.
    """

    def __init__(
        self, matrix: _Scaled, found: Decomposition, rank: int, dtype: torch.dtype, outer: Metric, inner: Metric
    ) -> None:
        self.matrix, self.dtype, self.outer, self.inner = matrix, dtype, outer, inner
        scaled = found.basis if inner is not None else found.basis * found.values.clamp_min(0).sqrt()
        self.first, self.others = scaled[:, -rank:], scaled[:, :-rank]
        self.sigma = found.values[-rank:].flip(0).clamp_min(0).sqrt()
        self.tail = float(found.values[:-rank].clamp_min(0).sum())
        self.leading = found.basis[:, -rank:].flip(1)
        self.weighted = apply_metric(inner, self.leading)
        self.partner = self._long(_partner(matrix, _pseudo_inverse(self.leading, self.weighted)))

    def best(self) -> _Rounded:
        """The one of the smallest loss; others than the singular vectors are tried where those lose much."""
        chosen = self._round(SINGULAR, self.leading, self.partner)
        refuse_overflow(chosen.small)
        if self.dtype.itemsize > 2 or len(self.sigma) < 2 or chosen.loss <= (1 + NEGLIGIBLE_EXCESS) * self.tail:
            return chosen
        # Both factors with columns that are orthonormal in their metrics.
        norms = (self.leading * self.weighted).sum(dim=0).clamp_min(0).sqrt()
        norms = norms.clamp_min(max(float(norms.max()) * SMALLEST_SHARE, torch.finfo(norms.dtype).tiny))
        floor = max(float(self.sigma[0]) * SMALLEST_SHARE, torch.finfo(self.sigma.dtype).tiny)
        small, large = self.leading / norms, self.partner * (norms / self.sigma.clamp_min(floor))
        for name, mix in BASES.items():
            x, y = mix(self.sigma)
            found = self._round(name, small @ y, large @ x, x)
            if found.loss < chosen.loss and bool(torch.isfinite(found.large).all()):
                chosen = found
        return chosen

    def _round(self, name: str, small: Tensor, large: Tensor, mixing: Tensor | None = None) -> _Rounded:
        """Round the factors of a product, [k, r] and [long side, r], balanced."""
        lengths = torch.linalg.vector_norm(large, dim=0)
        lengths = (lengths / torch.linalg.vector_norm(small, dim=0).clamp_min(torch.finfo(small.dtype).tiny)).sqrt()
        if mixing is None:
            first = (small * lengths).to(self.dtype)
        else:
            mixing = mixing / lengths.clamp_min(torch.finfo(small.dtype).tiny)
            first = round_with_feedback(small * lengths, mixing.T @ mixing, self.dtype)
        lifted = first.to(small.dtype)
        weighted = apply_metric(self.inner, lifted)
        solved = _pseudo_inverse(lifted, weighted)
        best = self._long(_partner(self.matrix, solved))
        gram = lifted.T @ weighted
        second = best.to(self.dtype) if mixing is None else round_with_feedback(best, gram, self.dtype)
        lost = self.first - lifted @ (solved @ self.first)
        loss = self.tail + float((lost * apply_metric(self.inner, lost)).sum())
        loss -= float(((solved @ self.others) * (weighted.T @ self.others)).sum())
        # A diagonal metric lets the rows be taken a panel at a time, so that no further copies of the factor are made.
        step = PANEL if self.outer is None or self.outer.dim() == 1 else best.shape[0]
        for start in range(0, best.shape[0], step):
            part = slice(start, start + step)
            error = second[part].to(best.dtype) - best[part]
            metric = self.outer[part] if self.outer is not None and self.outer.dim() == 1 else self.outer
            loss += float(((error @ gram) * apply_metric(metric, error)).sum())
        return _Rounded(first, self._long(second).contiguous(), max(loss, 0.0), name)

    def _long(self, factor: Tensor) -> Tensor:
        """The larger factor as [long side, r], or back."""
        return factor if self.matrix.tall else factor.T


def residual_of(weight: Tensor, down: Tensor, up: Tensor) -> float:
    """||W - up down||^2 in the Frobenius norm, formed explicitly in float32, of factors as they are stored."""
    matrix = _Scaled(weight, 1.0, Workspace())
    small, large = (down.T, up) if matrix.tall else (up, down)
    return _residual(matrix, small.float(), large, 1.0)[0]


def _residual(matrix: _Scaled, small: Tensor, large: Tensor, half: float) -> tuple[float, float]:
    """``(||W - product||^2, ||W||^2)`` in the Frobenius norm, formed explicitly.

    Args:
        matrix: W.
        small: the factor on the smaller side, scaled.
        large: the other one as it is stored.
        half: what `large` has to be multiplied with.
    """
    residual = energy = 0.0
    for part, piece in matrix.panels(small.dtype):
        piece_of_large = (large[part] if matrix.tall else large[:, part]).to(small.dtype) * half
        product = piece_of_large @ small.T if matrix.tall else small @ piece_of_large
        residual += float(torch.linalg.vector_norm(piece - product)) ** 2
        energy += float(torch.linalg.vector_norm(piece)) ** 2
    return residual, energy
