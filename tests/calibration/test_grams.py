"""Sums of x x^T against float64's, and what is lost by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdconvert.calibration.grams import GramSum
from svdconvert.linalg.exact import decompose, truncate

RANK = 32


def sum_of(rows: Tensor) -> Tensor:
    gram = GramSum(rows.shape[1], torch.device("cpu"))
    for part in rows.split(777):
        gram.add(part)
    return gram.mean(len(rows))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1e-14), (torch.float32, 3e-6)])
@pytest.mark.parametrize("massive", [1.0, 1e3])
@pytest.mark.parametrize("size", [5, 256, 300, 700])
def test_equals_float64(size: int, massive: float, dtype: torch.dtype, least: float) -> None:
    """Relative to sqrt(C_ii C_jj), so that the channels beside a massive one count as much as it does."""
    rows = torch.randn(3000, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[:, 1] = massive * (1 + 0.1 * rows[:, 1])
    wanted = rows.double().T @ rows.double() / len(rows)
    scale = wanted.diagonal().sqrt()
    found = sum_of(rows)
    assert torch.equal(found, found.T)
    assert float(((found - wanted) / scale[:, None] / scale).abs().max()) < least


@pytest.mark.parametrize("every", [256, 20, 6])
def test_massive_tokens(every: int) -> None:
    """Some tokens have massive channels: what lies beside them is still there, with float32 it is not."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2048, 96, generator=generator)
    rows[::every, :30] += 1e4 * torch.randn(30, generator=generator)
    exact = torch.linalg.eigvalsh(rows.double().T @ rows.double() / len(rows))
    found = torch.linalg.eigvalsh(sum_of(rows))
    assert torch.allclose(found, exact, rtol=1e-5)
    single = sum(((part.T @ part).double() for part in rows.split(777)), torch.zeros(96, 96, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(single / len(rows))[0]) < 0.9 * float(exact[0])


@pytest.mark.parametrize("shape", [(160, 80), (80, 160)])
@pytest.mark.parametrize("kind", ["benign", "tokens", "many tokens", "channels", "offset", "silent", "tiny", "huge"])
def test_no_loss_of_the_weighted_loss(kind: str, shape: tuple[int, int]) -> None:
    """A product that is best in the metric found loses as little in float64's as the one that is best there."""
    (m, n), generator = shape, torch.Generator().manual_seed(1)
    weight = torch.randn(m, n, generator=generator)
    # Ordinary channels are correlated: the eigenvalues span three decades.
    mixed = torch.linalg.qr(torch.randn(n, n, generator=generator))[0] * torch.logspace(0, -1.5, n)
    rows = torch.randn(6000, n, generator=generator) @ mixed @ torch.linalg.qr(weight.T @ weight)[0]
    some = rows[:, : n // 8]
    match kind:
        case "tokens":
            some[::512] += 1e4 * torch.randn(n // 8, generator=generator)
        case "many tokens":
            some[::7] += 1e3 * torch.randn(n // 8, generator=generator)
        case "channels":
            some *= 1e3
        case "offset":
            some += 1e3
        case "silent":
            rows[:, ::2].mul_(torch.rand(6000, 1, generator=generator) < 0.01)
            rows[:, 5] = 0
        case "tiny":
            rows *= 1e-12
        case "huge":
            rows *= 1e18
    wanted, found = rows.double().T @ rows.double() / len(rows), sum_of(rows)
    exact, ours = (decompose(weight, right=metric) for metric in (wanted, found))
    tail = float(exact.spectrum[RANK:].sum())
    assert float(ours.spectrum[RANK:].sum()) == pytest.approx(tail, rel=1e-4)
    factors = truncate(weight, ours, RANK, torch.float64, None, None, found)
    error = weight - factors.up @ factors.down
    assert float((error @ wanted * error).sum()) == pytest.approx(tail, rel=1e-4)


def test_few_products_are_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A massive token in 512, and gradients of which some are a hundred times as large as others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, 64, generator=generator) * torch.rand(4096, 1, generator=generator).mul(4.6).exp()
    rows[::512, :3] += 1e5
    exact: list[int] = []
    add = GramSum._add_exactly
    monkeypatch.setattr(GramSum, "_add_exactly", lambda gram, part: (exact.append(len(part)), add(gram, part)))
    sum_of(rows)
    assert sum(exact) == 8
