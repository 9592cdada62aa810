"""Matrices with known singular values."""

from __future__ import annotations

import torch


def matrix(m: int, n: int, spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Random singular vectors, given singular values; float64."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return (u * spectrum.double()) @ v.T


def power_law(k: int, exponent: float) -> torch.Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64).pow(-exponent)


def excess(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> float:
    """||W - up down|| over the Eckart-Young optimum, minus 1, all in float64."""
    exact = weight.double()
    tail = torch.linalg.svdvals(exact)[down.shape[0] :]
    return float(torch.linalg.norm(exact - up.double() @ down.double()) / torch.linalg.norm(tail)) - 1
