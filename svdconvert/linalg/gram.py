"""Gram matrices on the smaller side, and their eigenvectors and roots."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg import lapack
from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.precision import largest_entry, scale_of
from svdconvert.linalg.products import add_product, product


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
    matrix = Scaled(weight, scale_of(largest_entry(weight)), workspace)
    return gram_matrix(matrix, None, torch.float32), matrix.scale


def gram_matrix(matrix: Scaled, outer: Metric, dtype: torch.dtype) -> Tensor:
    """Lower triangle of W^T L W if W is tall, of W R W^T if it is wide: [k, k].

    Args:
        matrix: W.
        outer: the metric on the longer side.
        dtype: working type.
    """
    k = min(matrix.weight.shape)
    gram = matrix.work.take("gram", (k, k), dtype, matrix.weight.device).zero_()
    add_gram_matrix(gram, matrix, outer)
    return gram


def add_gram_matrix(gram: Tensor, matrix: Scaled, outer: Metric) -> None:
    """gram += :func:`gram_matrix`, in the lower triangle and in the type of the sum."""
    dtype = gram.dtype
    if outer is not None and outer.dim() == 2:
        whole = matrix.weight.to(dtype)
        for part, piece in matrix.panels(dtype):
            block = outer[part].to(dtype)
            if matrix.tall:
                _add_lower(gram, piece.T, product(block, whole))
            else:
                _add_lower(gram, product(whole, block.T), piece.T)
        return
    for part, piece in matrix.panels(dtype):
        if outer is not None:
            roots = outer[part].to(dtype).sqrt()
            piece = piece * (roots[:, None] if matrix.tall else roots)
        if piece.device.type == "cpu":
            lapack.add_gram(piece, gram, transposed=not matrix.tall)
            continue
        rows = piece if matrix.tall else piece.T  # [p, k]
        _add_lower(gram, rows.T, rows)


def _add_lower(gram: Tensor, one: Tensor, other: Tensor) -> None:
    """gram += one other, [k, p] times [p, k], in the lower triangle.

    Block columns from the diagonal down spare 7/16 of the arithmetic of the full product. (BLAS' syrk spares half.)
    """
    k = gram.shape[0]
    width = max(k // 8, 256)
    for start in range(0, k, width):
        stop = min(start + width, k)
        add_product(gram[start:, start:stop], one[start:], other[:, start:stop])


def eigenvectors(gram: Tensor, work: Workspace, count: int | None) -> tuple[Tensor, Tensor]:
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


def root_of(gram: Tensor) -> tuple[Tensor, bool]:
    """T with T T^T = P, for P given by its lower half: Cholesky's, or by eigenvectors where P is singular.

    A P whose factor shows that only rounding has made it regular is taken for singular: a metric may magnify what is
    left of its zeros. Others pass, since the factor is right to rounding all the same.

    Returns:
        ``(T, whether it is lower triangular)``.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    share = len(gram) * torch.finfo(gram.dtype).eps
    if not int(failed) and bool((factor.diagonal().square() > share * gram.diagonal()).all()):
        return factor.tril().contiguous(), True
    values, vectors = torch.linalg.eigh(gram, UPLO="L")
    return vectors * torch.where(values > share * values[-1], values, 0).sqrt(), False
