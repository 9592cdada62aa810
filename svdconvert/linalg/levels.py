"""A decomposition in a pair of metrics in float32 alone, for devices on which float64 is slow.

Of L^1/2 W R^1/2 only what is large is known to float32's digits once it has been squared. So nothing is squared but
what is of one size:

* Every metric is scaled to a unit diagonal by powers of two, which is exact and takes care of massive channels. What is
  left of one that is shrunk towards its diagonal (:func:`svdconvert.methods.table.shrink`) is well conditioned, and its
  Cholesky factor K is right to float32's digits. With channels in the order of their sizes, the massive ones first, the
  triangles keep their share out of the other rows and columns of M = K_L^T W K_R.
* The spectrum of M is found level by level. A level is the Gram matrix of what is left of M and those of its
  eigenvectors whose singular values are within a factor of fifty of the largest, which float32 resolves
  (``linalg/precision.py``). They are then taken off M itself, from both sides, and the rest is the next level's.

The result differs from float64's by some 1e-6 in the singular values. A metric that is not regular enough is left to
an eigenproblem in float64, with the products of ``linalg/products.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.linalg.gram import eigenvectors, gram_matrix
from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.panels import Scaled, Workspace
from svdconvert.linalg.precision import FLOAT32_EIGENVALUE_RATIO
from svdconvert.linalg.products import product
from svdconvert.linalg.results import Decomposition

# A metric of unit diagonal whose Cholesky factor has a smaller square on its diagonal is left to float64.
LEAST_PIVOT = 2.0**-8

# Each spans a factor of fifty in singular values; the last one takes what is left.
LEVELS = 5


@dataclass(frozen=True)
class _Side:
    """The root of a metric: channel ``order[i]`` is the i-th, R = S K K^T S in that order.

    Attributes:
        sizes: powers of two on S' diagonal, [k] float64; zero for a channel that the metric does not see.
        order: of the channels, largest first; [k].
        factor: K, [k, k] float32, lower triangular; None for the identity.
    """

    sizes: Tensor
    order: Tensor
    factor: Tensor | None

    @classmethod
    def of(cls, metric: Metric, size: int, device: torch.device) -> _Side | None:
        """The root of a metric; None where float32 does not do."""
        if metric is None:
            ones = torch.ones(size, dtype=torch.float64, device=device)
            return cls(ones, torch.arange(size, device=device), None)
        diagonal = metric if metric.dim() == 1 else metric.diagonal()
        diagonal = diagonal.double().clamp_min(0)
        seen = diagonal > 0
        roots = torch.where(seen, diagonal, 1).sqrt()
        _, exponents = torch.frexp(roots)
        powers = torch.pow(2.0, exponents.double())
        sizes = torch.where(seen, powers, 0)
        order = torch.argsort(sizes, descending=True, stable=True)
        if metric.dim() == 1:
            near = (roots / powers)[order].float().diag()
            return cls(sizes[order], order, near)
        scaled = (metric / powers / powers[:, None]).float()[order][:, order]
        scaled.diagonal().copy_(torch.where(seen[order], scaled.diagonal(), 1))
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if int(failed) or bool((factor.diagonal().square() < LEAST_PIVOT * scaled.diagonal()).any()):
            return None
        return cls(sizes[order], order, factor)

    def times(self, columns: Tensor) -> Tensor:
        """K^T times [k, c], whose rows are in the order of the channels."""
        return columns if self.factor is None else self.factor.T @ columns

    def back(self, columns: Tensor) -> Tensor:
        """S^-1 K^-T times [k, c], rows in the model's own order; [k, c] float64."""
        if self.factor is not None:
            columns = torch.linalg.solve_triangular(self.factor.T, columns, upper=True)
        seen = self.sizes > 0
        exact = columns.double() * torch.where(seen, 1 / torch.where(seen, self.sizes, 1), 0)[:, None]
        return torch.empty_like(exact).index_copy_(0, self.order, exact)


def decompose_in_levels(weight: Tensor, left: Metric, right: Metric, work: Workspace) -> Decomposition | None:
    """What :func:`svdconvert.linalg.exact.decompose` gives, by products of float32; None where they do not do.

    Args:
        weight, left, right: see :func:`svdconvert.linalg.exact.factorize`; one metric at least is not None.
        work: its buffers hold the Gram matrices.
    """
    m, n = weight.shape
    rows, columns = _Side.of(left, m, weight.device), _Side.of(right, n, weight.device)
    if rows is None or columns is None:
        return None
    exact = weight.double()[rows.order][:, columns.order] * rows.sizes[:, None] * columns.sizes
    unit = float(exact.abs().max())
    if not unit:
        return None
    scaled = (exact / unit).float()
    outer, inner = (rows, columns) if m >= n else (columns, rows)
    known = outer.times(scaled if m >= n else scaled.T)  # [long side, small side]
    known = inner.times(known.T).T.contiguous()
    squares, vectors = _by_levels(known, work)
    lengths = squares.sqrt()
    if inner.factor is None:
        return Decomposition(squares.flip(0) * unit**2, vectors.double().flip(1), single=True)
    basis = inner.back(vectors * lengths.float()) * unit
    unseen = inner.sizes == 0
    if bool(unseen.any()):  # there M has nothing, and the basis is W^T L^1/2 U
        lasting = lengths > torch.finfo(torch.float32).eps * lengths[0]
        ends = known @ (vectors * torch.where(lasting, 1 / lengths, 0).float())
        through = ends if outer.factor is None else outer.factor @ ends
        part = (weight if m >= n else weight.T)[outer.order][:, inner.order[unseen]].double() * outer.sizes[:, None]
        basis[inner.order[unseen]] = product(part.T, through.double())
    return Decomposition(squares.flip(0) * unit**2, basis.flip(1), single=True)


def _by_levels(known: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Squared singular values, descending, [k] float64, and right singular vectors, [k, k] float32.

    Args:
        known: M, [l, k] float32, l >= k.
        work: gets the Gram matrices and their eigenvectors.
    """
    values, vectors, chain = [], [], None
    for level in range(LEVELS):
        size = known.shape[1]
        found, basis = eigenvectors(gram_matrix(Scaled(known, 1.0, work, True), None, torch.float32), work, None)
        good = int((found > found[-1] / FLOAT32_EIGENVALUE_RATIO).sum())
        if level == LEVELS - 1 or float(found[-1]) <= 0:
            good = size
        wanted, others = basis[:, size - good :].flip(1), basis[:, : size - good]
        images = known @ wanted
        squares = images.double().square().sum(0)
        values.append(squares)
        if good < size:
            ends, rest = images / squares.sqrt().float(), known @ others
            # Vectors of float32 are some 1e-6 off, which times the largest singular values is more than the smallest.
            leak = (ends.T @ rest) / squares.sqrt().float()[:, None]
            wanted, others = wanted + others @ leak.T, others - wanted @ leak
            known = rest - images @ leak
        vectors.append(wanted if chain is None else chain @ wanted)
        if good == size:
            break
        chain = others if chain is None else chain @ others
    every = torch.cat(values)
    order = torch.argsort(every, descending=True, stable=True)
    return every[order], torch.cat(vectors, dim=1)[:, order]
