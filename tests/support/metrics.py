"""Metrics of every kind, and what they are written out in float64."""

from __future__ import annotations

import torch

SHAPES = [(48, 48), (96, 32), (32, 96), (33, 20)]


KINDS = ["identity", "vector", "matrix", "outliers", "singular", "zeros"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(kind: str, size: int, seed: int) -> torch.Tensor | None:
    """A metric on `size` channels."""
    if kind == "identity":
        return None
    if kind == "vector":
        return normal(size, seed=seed).square() + 0.01
    if kind == "zeros":
        return normal(size, seed=seed).square() * (torch.arange(size) % 3 > 0)
    samples = normal(max(size // 2, 1) if kind == "singular" else 4 * size, size, seed=seed)
    if kind == "outliers":
        samples = samples * (1 + 1000 * (torch.arange(size) % 7 == 0))
    return samples.T @ samples / samples.shape[0]


def dense(value: torch.Tensor | None, size: int) -> torch.Tensor:
    if value is None:
        return torch.eye(size, dtype=torch.float64)
    return value if value.dim() == 2 else value.diag()


def root(value: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(value)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def loss(weight: torch.Tensor, product: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    error = weight - product
    return float((left @ error @ right * error).sum())
