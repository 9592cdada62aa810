"""The error of a layer's outputs at every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.linalg.gram import gram_matrix
from svdconvert.linalg.metrics import Metric, apply_metric
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.products import product
from svdconvert.linalg.results import Decomposition


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
    matrix = Scaled(weight, 1.0, Workspace())  # one of its own: the basis may lie in the caller's
    basis = found.basis.flip(1).double()
    seen = apply_metric(right if matrix.tall else left, basis)
    lengths = (basis * seen).sum(dim=0)
    used = lengths > torch.finfo(torch.float64).eps * lengths.numel() * lengths.max()
    if same and not matrix.tall:  # with W R W^T = T T^T and S = T Z, Z orthogonal: Y^T W R W^T Y = 1
        captured = basis.square().sum(dim=0)
        total, gains = captured.sum(), captured * used
    else:
        partner = torch.where(used, seen / torch.where(used, lengths, 1), 0)
        lower = gram_matrix(matrix, None if matrix.tall else gram, torch.float64)
        other = lower.tril() + lower.tril(-1).T
        through = product(other, partner)
        if same:  # S^T C S is diagonal
            total, gains = (other * gram).sum(), (seen * through).sum(dim=0)
        else:
            on_basis = product(gram, basis) if matrix.tall else basis
            total = (other * gram).sum() if matrix.tall else other.trace()
            pairs = product(basis.T, on_basis) * product(partner.T, through)
            gains = 2 * (on_basis * through).sum(dim=0) - 2 * pairs.triu(1).sum(dim=0) - pairs.diagonal()
    return torch.cat([total[None], total - gains.cumsum(0)]).clamp_min(0)
