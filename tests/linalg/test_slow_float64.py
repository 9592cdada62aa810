"""The road of devices on which float64 is slow, on an emulated one, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.accelerator import DEVICE, emulated, on_host, slow_float64
from support.counting import Multiplications
from support.metrics import loss, normal
from torch import Tensor

from svdconvert.calibration.grams import GramSum
from svdconvert.layouts.table import layout_named
from svdconvert.linalg import products, rates
from svdconvert.linalg.exact import decompose, truncate
from svdconvert.linalg.output_losses import output_losses
from svdconvert.linalg.results import Factors, Truncation
from svdconvert.methods.table import shrink

KINDS = ["benign", "tokens", "many tokens", "channels", "offset", "silent", "dead", "tiny", "huge"]
SHAPES = [(160, 80), (80, 160), (96, 96)]


@pytest.fixture
def counter() -> Iterator[Multiplications]:
    """The device, on which float64 is slow, and what it multiplies."""
    counter = Multiplications()
    with slow_float64(), emulated(counter):
        yield counter


def moment(kind: str, size: int, seed: int) -> Tensor:
    """Second moments of activations with massive tokens or channels, shrunk as kfac's are."""
    mixed = torch.linalg.qr(normal(size, size, seed=seed))[0] * torch.logspace(0, -1.5, size, dtype=torch.float64)
    rows = normal(4000, size, seed=seed + 1) @ mixed @ torch.linalg.qr(normal(size, size, seed=seed + 2))[0]
    some = rows[:, : size // 8]
    match kind:
        case "tokens":
            some[::512] += 1e4 * normal(size // 8, seed=seed + 3)
        case "many tokens":
            some[::7] += 1e3 * normal(size // 8, seed=seed + 3)
        case "channels":
            some *= 1e3
        case "offset":
            some += 1e3
        case "silent":
            rows[:, ::2].mul_(normal(4000, 1, seed=seed + 4) > 2.3)
        case "dead":
            rows[:, 5:9] = 0
        case "tiny":
            rows *= 1e-12
        case "huge":
            rows *= 1e15
    return shrink(rows.T @ rows / len(rows), 0.2)


def problem(shape: tuple[int, int], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of 16 bits and its metrics, of which one is massive."""
    weight = normal(*shape, seed=9).bfloat16()
    return weight, moment("benign", shape[0], 20), moment(kind, shape[1], 10)


def converted(layout: str, weight: Tensor, left: Tensor, right: Tensor, rank: int) -> tuple[Truncation, Tensor]:
    """A matrix as a conversion stores it, in float16, and the errors of its outputs at every rank."""
    found, diagonal = decompose(weight, left=left, right=right), left.diagonal()

    def solve(dtype: torch.dtype) -> Factors:
        return truncate(weight, found, rank, dtype, None, diagonal, right)

    made = layout_named(layout).truncate(weight, solve, torch.float16, diagonal, right)
    return made, output_losses(weight, found, left, right, right * 0.9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_loss_is_that_of_float64(kind: str, shape: tuple[int, int], counter: Multiplications) -> None:
    """At every rank, and the tails that budgets are spent by."""
    weight, left, right = problem(shape, kind)
    exact = decompose(weight, left=left, right=right)
    ours = [tensor.to(DEVICE) for tensor in (weight, left, right)]
    found = decompose(ours[0], left=ours[1], right=ours[2])
    assert found.precision == "float32"
    assert exact.precision == "float64"
    for rank in (4, 20, 40, 70):
        tail = float(exact.spectrum[rank:].sum())
        assert float(on_host(found.spectrum)[rank:].sum()) == pytest.approx(tail, rel=2e-5)
        factors = truncate(ours[0], found, rank, torch.float64, None, ours[1], ours[2])
        product = on_host(factors.up) @ on_host(factors.down)
        assert loss(weight, product, left, right) == pytest.approx(tail, rel=1e-4)
        assert factors.metric_loss == pytest.approx(tail, rel=1e-4)
        other = truncate(weight, exact, rank, torch.float64, None, left, right)
        assert factors.relative_error == pytest.approx(other.relative_error, rel=1e-2)


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
@pytest.mark.parametrize("kind", ["benign", "tokens", "channels"])
def test_stored_tensors_lose_as_little(kind: str, layout: str, counter: Multiplications) -> None:
    """Rounded to 16 bits in either layout, they lose what they lose on the other road, and the errors told agree."""
    weight, left, right = problem((160, 80), kind)
    lost = {}
    for device in ("cpu", DEVICE):
        w, lefts, rights = (tensor.to(device) for tensor in (weight, left, right))
        made, losses = converted(layout, w, lefts, rights, 24)
        product = layout_named(layout).product([on_host(tensor) for tensor in made.tensors])
        lost[str(device)] = (loss(weight, product, left, right), on_host(losses), made.relative_error)
    (one, losses, error), (other, others, its) = lost.values()
    assert other == pytest.approx(one, rel=5e-3)  # rounding itself is chance
    assert torch.allclose(others, losses, rtol=1e-4, atol=1e-6 * float(losses[0]))
    assert its == pytest.approx(error, rel=1e-3)


def test_float32_alone_would_not_do(monkeypatch: pytest.MonkeyPatch, counter: Multiplications) -> None:
    """The bar above is one that can be missed: with everything in one level it is."""
    monkeypatch.setattr("svdconvert.linalg.levels.LEVELS", 1)
    weight, left, right = problem((160, 80), "tokens")
    tail = float(decompose(weight, left=left, right=right).spectrum[40:].sum())
    found = decompose(weight.to(DEVICE), left=left.to(DEVICE), right=right.to(DEVICE))
    factors = truncate(weight.to(DEVICE), found, 40, torch.float64, None, left.to(DEVICE), right.to(DEVICE))
    assert loss(weight, on_host(factors.up) @ on_host(factors.down), left, right) > 1.01 * tail


def test_irregular_metrics_are_left_to_float64(counter: Multiplications) -> None:
    weight, left, _ = problem((96, 96), "benign")
    inputs = normal(20, 96)
    singular = inputs.T @ inputs
    found = decompose(weight.to(DEVICE), left=left.to(DEVICE), right=singular.to(DEVICE))
    assert found.precision == "float64"
    exact = decompose(weight, left=left, right=singular)
    assert torch.allclose(on_host(found.spectrum)[:20], exact.spectrum[:20], rtol=1e-6)


@pytest.mark.parametrize(("offset", "more"), [(1e3, 1e-4), (1e4, 0.05)])
def test_singular_metrics_with_an_offset(offset: float, more: float, counter: Multiplications) -> None:
    """Here slices have fewer digits than float64, and cost a part of the loss that nobody shrinks away."""
    rows = normal(3000, 128, seed=3)
    rows = (rows - rows.mean(1, keepdim=True) + offset * normal(128, seed=6)).float()
    weight, lost = normal(160, 128, seed=7).float(), []
    for device in (torch.device("cpu"), DEVICE):
        gram = GramSum(128, device, exact=True)
        gram.add(rows.to(device))
        metric, ours = gram.mean(len(rows)), weight.to(device)
        factors = truncate(ours, decompose(ours, right=metric), 96, torch.float64, None, None, metric)
        rest = weight.double() - on_host(factors.up) @ on_host(factors.down)
        lost.append(float((rest @ rows.double().T).square().sum()) / len(rows))
        assert factors.metric_loss == pytest.approx(lost[-1], rel=max(more, 1e-4))
    assert lost[1] == pytest.approx(lost[0], rel=more)


def test_little_is_left_to_float64(counter: Multiplications) -> None:
    """Of all that the other road does in it, beside the roots of small matrices."""
    weight, left, right = (tensor.to(DEVICE) for tensor in problem((384, 256), "tokens"))
    counts = {}
    for times in (1.0, 64.0):
        with slow_float64(times):
            counter.found.clear()
            converted("pivoted", weight, left, right, 96)
            counts[times] = counter.of("float64"), counter.of("float32")
    (reference, few), (double, single) = counts.values()
    assert few < reference / 100
    assert double < 0.05 * reference
    assert single < 16 * reference


@pytest.mark.parametrize("size", [(33, 70, 45), (64, 2500, 40)])
def test_products_of_slices(size: tuple[int, int, int], counter: Multiplications) -> None:
    m, k, n = size
    left, right = normal(m, k) * torch.logspace(0, 12, m)[:, None].double(), normal(k, n, seed=1)
    left[3], right[:, 5] = 0, 0
    found = on_host(products.product(left.to(DEVICE), right.to(DEVICE)))
    scale = left.abs().amax(1)[:, None] * right.abs().amax(0) * k**0.5
    assert bool(((found - left @ right).abs() <= 2e-11 * scale).all())
    assert counter.of("float64") < counter.of("float32") / 10
    half = left.bfloat16().double()
    assert torch.allclose(on_host(products.product(half.to(DEVICE), half.T.to(DEVICE))), half @ half.T, rtol=1e-9)
    left[0, 0] = float("nan")
    assert bool(on_host(products.product(left.to(DEVICE), right.to(DEVICE)))[0, :5].isnan().all())


def test_solving_by_a_root(counter: Multiplications) -> None:
    gram = normal(90, 60).T @ normal(90, 60)
    root, right = torch.linalg.cholesky(gram), normal(60, 50, seed=3)
    found = products.solve_by_root(root.to(DEVICE), right.to(DEVICE))
    assert torch.allclose(on_host(found), torch.cholesky_solve(right, root), rtol=1e-8, atol=1e-10)


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(rates, "_SIDE", 300)
    assert 0.2 < rates._measured(torch.device("cpu")) < 20


def test_only_where_float64_is_slow() -> None:
    """Elsewhere the bits are those of torch's own products, and nothing is measured."""
    assert not rates.has_slow_float64(torch.device("cpu"))
    left, right = normal(40, 50), normal(50, 60)
    assert torch.equal(products.product(left, right), left @ right)


def test_plain_svd_of_a_wide_range(counter: Multiplications) -> None:
    """Slices tell singular values of a millionth of the largest."""
    left, right = (torch.linalg.qr(normal(size, 80, seed=size))[0] for size in (120, 80))
    values = torch.logspace(0, -9, 80, dtype=torch.float64)
    weight, found = (left * values) @ right.T, []
    for device in (torch.device("cpu"), DEVICE):
        ours = weight.to(device)
        factors = truncate(ours, decompose(ours), 50, torch.float64)
        found.append(float((weight - on_host(factors.up) @ on_host(factors.down)).norm()))
    assert found[0] == pytest.approx(float(values[50:].norm()), rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=0.05)
