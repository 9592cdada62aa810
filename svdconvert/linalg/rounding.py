"""Rounding the factors of a product where a few components outweigh the rest (massive input channels, for one).

Rounded to the nearest, the factor of a product's component j costs about u^2 sigma_j^2, u the unit roundoff. With
channels a thousand times as large as the others that is more than the truncation itself loses, all of it in a handful
of components. Two things together avoid it, and neither costs a rank:

* Feedback. With H the Gram matrix of the factor that stays, a row e of rounding errors costs e H e^T. Entries are
  rounded one after another, and each takes up what the errors before it can still be made good of: with H = J J^T, J
  upper triangular, entry j costs u^2 J_jj^2 (successive cancellation; LDLQ of Chee et al., arXiv:2307.13304). Where
  the columns are orthogonal, as singular vectors are, that changes nothing.
* Another basis of the same product, in which they are not: diag(sigma) = Q T P^T with orthogonal Q and P and T upper
  triangular, whose diagonal is constant, the geometric mean g of sigma (Jiang, Hager and Li, "The geometric mean
  decomposition", 2005). The factor with Q then costs r u^2 g^2 in place of u^2 sum_j sigma_j^2.

The geometric mean decomposition protects one factor; :func:`paired` protects both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from svdconvert.linalg.products import add_product, product

# Columns that are rounded before their errors are handed on to all later ones.
BLOCK = 64

# Singular values below this share of the largest one count as that large.
SMALLEST_SHARE = 1e-8


def round_with_feedback(rows: Tensor, gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Round rows x such that (x' - x) H (x' - x)^T is small; row by row never worse than the nearest values.

    Args:
        rows: [p, r] float64.
        gram: H, [r, r] float64, symmetric, >= 0. Where it is singular, the nearest values are taken.
        dtype: type to round to.

    Returns:
        [p, r] in ``dtype``.
    """
    nearest, upper = rows.to(dtype), upper_factor(gram)
    if upper is None:
        return nearest
    # Row i: what an error of 1 in column i asks of the later columns.
    demand = upper / upper.diagonal()
    rounded, wanted = torch.empty_like(nearest), rows.clone()
    for start in range(0, rows.shape[1], BLOCK):
        stop = min(start + BLOCK, rows.shape[1])
        for j in range(start, stop):
            rounded[:, j] = wanted[:, j]
            error = rounded[:, j].to(rows.dtype) - rows[:, j]
            wanted[:, j + 1 : stop].addr_(error, demand[j, j + 1 : stop], alpha=-1)
        errors = rounded[:, start:stop].to(rows.dtype) - rows[:, start:stop]
        add_product(wanted[:, stop:], errors, demand[start:stop, stop:], -1)

    def cost(candidate: Tensor) -> Tensor:
        return product(candidate.to(rows.dtype) - rows, upper).square().sum(dim=1)

    better = cost(rounded) < cost(nearest)  # false for NaN
    return torch.where(better[:, None], rounded, nearest)


def upper_factor(gram: Tensor, ridges: Sequence[float] = (0.0,)) -> Tensor | None:
    """J, upper triangular, with H = J J^T; None where there is none.

    Args:
        gram: H, [r, r] float64, symmetric, >= 0.
        ridges: what may be added to its diagonal, relative to that; the first that is enough is.
    """
    used = gram.diagonal() > 0
    norms = torch.where(used, gram.diagonal(), 1).sqrt()  # zeros: a column that nothing depends on
    near = gram / norms / norms[:, None]
    ones = torch.where(used, near.diagonal(), 1)
    for ridge in ridges:
        near.diagonal().copy_(ones + ridge)
        lower, failed = torch.linalg.cholesky_ex(near.flip(0, 1))
        if not int(failed):
            return lower.flip(0, 1) * norms[:, None]
    return None


def geometric_mean_decomposition(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, T, P with diag(values) = Q T P^T: Q and P orthogonal, T upper triangular with a constant diagonal.

    Jiang, Hager and Li (2005), section 3: one pair of rotations for every element of the diagonal.

    Args:
        values: [r] float64, positive.

    Returns:
        Three [r, r] float64, on the CPU.
    """
    r = values.numel()
    mean = float(values.log().mean().exp()) if r else 1.0
    t = values.cpu().diag()
    q, p = torch.eye(r, dtype=t.dtype), torch.eye(r, dtype=t.dtype)
    for i in range(r - 1):
        one = float(t[i, i])
        rest = t.diagonal()[i + 1 :]
        other = i + 1 + int(rest.argmin() if one >= mean else rest.argmax())
        if other != i + 1:
            for part in (t, q, p):
                part[:, [i + 1, other]] = part[:, [other, i + 1]]
            t[[i + 1, other]] = t[[other, i + 1]]
        two = float(t[i + 1, i + 1])
        gap = (one - two) * (one + two)
        square = (mean - two) * (mean + two) / gap if abs(gap) > 1e-14 * one * one else 1.0
        cosine = math.sqrt(min(max(square, 0.0), 1.0))
        sine = math.sqrt(1 - cosine**2)
        # Rounding takes `mean` out of the interval at times; the exact length keeps the rotation one.
        length = math.hypot(cosine * one, sine * two)
        inner = t.new_tensor([[cosine, -sine], [sine, cosine]])
        outer = t.new_tensor([[cosine * one, -sine * two], [sine * two, cosine * one]]) / length
        pair = slice(i, i + 2)
        t[:, pair] = t[:, pair] @ inner
        t[pair] = outer.T @ t[pair]
        t[i + 1, i] = 0
        p[:, pair] = p[:, pair] @ inner
        q[:, pair] = q[:, pair] @ outer
    return q, t, p


def equalized(values: Tensor) -> tuple[Tensor, Tensor]:
    """A basis of diag(values) = X Y^T in which feedback makes the rounding of X nearly independent of large values.

    Args:
        values: [r], not negative, descending.

    Returns:
        ``(X, Y)``, [r, r] float64 each, on the device of ``values``. X is orthogonal.
    """
    q, t, p = geometric_mean_decomposition(_positive(values))
    return q.to(values.device), (p @ t.T).to(values.device)


def paired(values: Tensor) -> tuple[Tensor, Tensor]:
    """A basis of diag(values) = X Y^T in which feedback helps the rounding of both X and Y.

    Every second one of the weaker half of the components is set apart, and the others are :func:`equalized`. That
    leaves columns of Y of large norm n. Each is paired with one set apart, of value s: its column of X is added c times
    to that of the other, and of Y the reverse is subtracted. The error of Y can then be made good by the other column,
    and costs u^2 n^2 s^2 / (c^2 + s^2), while that one costs u^2 (c^2 + s^2). The sum is least for c^2 = s (n - s).

    Args:
        values: [r], not negative, descending.

    Returns:
        ``(X, Y)``, [r, r] float64 each, on the device of ``values``.
    """
    sizes = _positive(values)
    r = sizes.numel()
    apart = torch.arange(r - 1, max(r // 2, 1) - 1, -2)  # weakest first
    others = torch.ones(r, dtype=torch.bool)
    others[apart] = False
    q, t, p = geometric_mean_decomposition(sizes[others])
    count = q.shape[0]
    x, y = sizes.new_zeros(r, r), sizes.new_zeros(r, r)
    x[others.nonzero(), torch.arange(count)] = q
    y[others.nonzero(), torch.arange(count)] = p @ t.T
    x[apart, torch.arange(count, r)] = sizes[apart]
    y[apart, torch.arange(count, r)] = 1
    norms = torch.linalg.vector_norm(t, dim=1)
    largest = norms.argsort(descending=True)[: len(apart)]
    partners = torch.arange(count, count + len(largest))
    weak = sizes[apart[: len(largest)]]
    share = (weak * (norms[largest] - weak)).clamp_min(0).sqrt()
    x[:, partners] += share * x[:, largest]
    y[:, largest] -= share * y[:, partners]
    return x.to(values.device), y.to(values.device)


# Bases other than that of the singular vectors. X is the larger factor's.
BASES: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"equalized": equalized, "paired": paired}


def _positive(values: Tensor) -> Tensor:
    exact = values.double().cpu()
    return exact.clamp_min(max(float(exact.max()) * SMALLEST_SHARE, torch.finfo(torch.float64).tiny))
