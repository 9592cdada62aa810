"""Muon written out on singular values, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonalised(matrix: Tensor) -> Tensor:
    """U f(S) V^T in float64: f takes s / ||S|| through 3.4445 s - 4.7750 s^3 + 2.0315 s^5 five times."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def muon_step(mean: Tensor, gradient: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The running mean, and what is to be taken from the matrix."""
    mean = 0.95 * mean + 0.05 * gradient
    return mean, rate * 0.2 * math.sqrt(max(mean.shape)) * orthogonalised(0.05 * gradient + 0.95 * mean)
