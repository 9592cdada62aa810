"""Calibrated rounding to integer grids: entries that make up for the errors of those before them."""

from __future__ import annotations

import torch
from torch import Tensor

from svdconvert.grids import Grid
from svdconvert.linalg.descent import descend
from svdconvert.linalg.integers import Rounded, codes_of, nearest, scales_of, working
from svdconvert.linalg.rounding import BLOCK, upper_factor

# What is added to the diagonal of a Gram matrix that has no Cholesky factor, relative to it; the first that is enough.
RIDGES = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)

# Sweeps of what is written. On SmolLM2-135M, all matrices in 4 bits, two took 9 % off the KL that feedback alone
# leaves, and four 10 %. Prices do without: a sweep costs as much as the feedback.
SWEEPS = 3

# Raised when a matrix is rounded otherwise than before, so that prices which were kept are not taken for today's.
PROCEDURE = 3


class Feedback:
    """Calibrated rounding in one metric: what all matrices that read the same inputs, and all grids, have in common.

    Entries are rounded one after another, and the later ones move to where they best make up for the error (GPTQ,
    Frantar et al., arXiv:2210.17323, algorithm 1, with the Cholesky factor of H^-1). Inputs of large moments come
    first, while there are many left to make up for their errors. Scales are chosen before all that, so groups stay
    those of neighbours. With H = J J^T in that order, J upper triangular, an error of entry j costs J_jj^2 after
    that; the scales are chosen by it.
    """

    def __init__(self, gram: Tensor) -> None:
        """Prepare.

        Args:
            gram: H, second moments of the inputs, [n, n], symmetric, >= 0. Where it is singular, the least of
                :data:`RIDGES` that helps is added to its diagonal.
        """
        self._gram, counts = gram, gram.diagonal().double()
        self._counts = counts
        self._order = counts.argsort(descending=True, stable=True)
        self._upper = upper_factor(gram.double()[self._order][:, self._order], RIDGES)
        if self._upper is not None:
            identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
            inverse = torch.linalg.solve_triangular(self._upper, identity, upper=True)
            self._passed_on = inverse.mul_(self._upper.diagonal()[:, None])
            self._upper *= (counts[self._order] > 0)[:, None]  # what nothing depends on costs nothing
            self._cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def round(self, weight: Tensor, grid: Grid, scale_dtype: torch.dtype, sweeps: int = 0) -> Rounded:
        """Round rows w such that (w' - w) H (w' - w)^T is small; row by row never worse by it than :func:`nearest`.

        Computed in float64 where the weight is, else in float32. Where H has no Cholesky factor, all is rounded to the
        nearest.

        Args:
            weight: [m, n], any floating type.
            grid: its groups divide n.
            scale_dtype: type that the scales are stored in.
            sweeps: of coordinate descent afterwards (:func:`svdconvert.linalg.descent.descend`).

        Raises:
            InputError: see :func:`nearest`.
        """
        exact = weight.to(working(weight))
        plain = nearest(exact, grid, scale_dtype, self._counts)
        if self._upper is None:
            return plain
        upper, _ = self._factors(exact.dtype)
        wanted = exact[:, self._order]

        def cost(candidate: Rounded) -> Tensor:
            values = candidate.values(exact.dtype)[:, self._order]
            return (values.sub_(wanted) @ upper).square_().sum(dim=1, keepdim=True)

        def better(one: Rounded, other: Rounded) -> Rounded:
            chosen = cost(one) < cost(other)  # false for NaN
            return Rounded(torch.where(chosen, one.codes, other.codes), torch.where(chosen, one.scales, other.scales))

        found = better(self._one_after_another(wanted, exact, grid, scale_dtype), plain)
        return better(descend(exact, found, self._gram, grid, sweeps), found) if sweeps else found

    def _one_after_another(self, wanted: Tensor, exact: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Rounded:
        """Each entry to what the errors before it ask for. Columns are rows here, in the order of their turns."""
        upper, passed_on = self._factors(exact.dtype)
        (m, n), order = exact.shape, self._order
        groups, group = grid.scales((m, n))[1], grid.group or n
        importance = torch.empty_like(upper.diagonal())
        importance[order] = upper.diagonal().square()
        scales = scales_of(exact.unflatten(1, (groups, group)), grid, scale_dtype, importance.view(groups, group))
        steps, turns = scales.T.to(exact.dtype).contiguous(), (order // group).tolist()
        wanted = wanted.T.contiguous()
        errors = torch.empty_like(wanted)
        codes = torch.empty(n, m, dtype=torch.int8, device=exact.device)
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            for j in range(start, stop):
                step = steps[turns[j]]
                code = codes_of(wanted[j], step, grid)
                codes[j] = code
                errors[j] = code * step - wanted[j]
                wanted[j + 1 : stop].addr_(passed_on[j, j + 1 : stop], errors[j])
            wanted[stop:].addmm_(passed_on[start:stop, stop:].T, errors[start:stop])
        sorted_back = torch.empty_like(codes)
        sorted_back[order] = codes
        return Rounded(sorted_back.T.contiguous(), scales)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(J, row i: by how much an error in column i moves the optimum of the later ones)``, [n, n] in a type."""
        assert self._upper is not None
        if dtype not in self._cast:
            self._cast[dtype] = self._upper.to(dtype), self._passed_on.to(dtype)
        return self._cast[dtype]
