"""Muon's orthogonalisation written out on singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalised(matrix: Tensor) -> Tensor:
    """U f(S) V^T in float64: f takes s / ||S|| through 3.4445 s - 4.7750 s^3 + 2.0315 s^5 five times."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt
