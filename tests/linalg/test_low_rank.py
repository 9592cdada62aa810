"""Exactly low rank, zeros, metrics of zeros: what rounding leaves of nothing is told from something."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import random_tensors, read_config, read_weights, write_checkpoint
from support.metrics import metric
from torch import Tensor

from svdconvert.factoring.operations import OPERATIONS
from svdconvert.linalg.exact import decompose, factorize, truncate
from svdconvert.linalg.filtered import factorize_fast
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.pivot import LARGEST_COEFFICIENT, product
from svdconvert.linalg.rounding import round_with_feedback
from svdconvert.linalg.shared import RIDGE, decompose_shared, outer_statistic, plain_shared, truncate_shared
from svdconvert.linalg.stacked import factorize_stack, settle
from svdconvert.planning.steps import Step
from svdconvert.tensors import TensorInfo

# What storage may take off the product of two factors that are rounded one after the other, in units of eps.
ROUNDED = 4.0


@st.composite
def low_rank(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """``(matrix, its rank or, in float32's last digits, more; a rank above it)``."""
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    m, n = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    true = draw(st.integers(0, min(m, n) - 1))
    rank = draw(st.integers(true + 1, min(m, n)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["products", "copies", "dead"]))
    if kind == "products":  # of small integers, which every type holds exactly
        left, right = (torch.randint(-1, 2, shape, generator=generator).float() for shape in ((m, true), (true, n)))
        weight = left @ right
    elif kind == "copies":  # of a few rows
        rows = torch.cat([torch.randn(true, n, generator=generator), torch.zeros(1, n)])
        weight = rows[torch.randint(0, true + 1, (m,), generator=generator)]
    else:
        weight = torch.zeros(m, n)
        weight[:true] = torch.randn(true, n, generator=generator)
    scale = 2.0 ** draw(st.integers(-6, 6))
    return (weight * scale).to(dtype), true, rank


def largest(weight: Tensor) -> float:
    """sigma_1."""
    return float(torch.linalg.matrix_norm(weight.double(), 2))


def far(weight: Tensor, found: Tensor) -> float:
    """Relative to ||W||; absolute where there is none."""
    return float((weight.double() - found).norm()) / (float(weight.double().norm()) or 1.0)


def assert_sound(weight: Tensor, true: int, down: Tensor, up: Tensor, ridge: float = 0.0) -> None:
    """Finite, no entry above sigma_1's share, the product right, and nothing beyond the rank."""
    assert torch.isfinite(down).all()
    assert torch.isfinite(up).all()
    bound = 2 * math.sqrt(largest(weight))
    assert float(down.double().abs().max()) <= bound
    assert float(up.double().abs().max()) <= bound
    assert far(weight, up.double() @ down.double()) <= ROUNDED * torch.finfo(down.dtype).eps + 2 * ridge
    assert not down[true:].any()
    assert not up[:, true:].any()


@pytest.mark.parametrize("how", ["exact", "fast", "kept", "stacked", "metric", "diagonal metric"])
@settings(max_examples=60)
@given(case=low_rank())
def test_nothing_beyond_the_rank(how: str, case: tuple[Tensor, int, int]) -> None:
    weight, true, rank = case
    dtype, n = weight.dtype, weight.shape[1]
    if how == "fast":
        found = factorize_fast(weight, rank, dtype)
    elif how == "kept":
        found = truncate(weight, decompose(weight), rank, dtype)
    elif how == "stacked":
        stack = factorize_stack(weight[None], rank, dtype)
        settled = settle(weight[None], stack, stack.facts)[0]
        assert (settled is None) == bool(weight.any())  # what float32 cannot tell is done again, and zeros it can
        found = settled or factorize(weight, rank, dtype)
    else:
        right = {"metric": torch.eye(n).double(), "diagonal metric": torch.ones(n).double()}.get(how)
        found = factorize(weight, rank, dtype, right=right)
    assert_sound(weight, true, found.down, found.up)
    assert found.optimal_error <= found.relative_error
    assert found.optimal_error < 1e-7
    assert found.metric_error == pytest.approx(found.relative_error, abs=1e-6)


@settings(max_examples=60)
@given(case=low_rank(), seed=st.integers(0, 1000), left=st.booleans())
def test_in_metrics_that_differ_much(case: tuple[Tensor, int, int], seed: int, left: bool) -> None:
    weight, true, rank = case
    m, n = weight.shape
    lefts = metric("matrix", m, seed) if left else None
    found = factorize(weight, rank, torch.float32, left=lefts, right=metric("outliers", n, seed + 1))
    assert torch.isfinite(found.down).all()
    assert not found.down[true:].any()
    assert not found.up[:, true:].any()
    assert far(weight, found.up.double() @ found.down.double()) < 1e-3
    assert found.optimal_error <= found.metric_error


@pytest.mark.parametrize("method", ["plain", "metric"])
@settings(max_examples=40)
@given(case=low_rank(), cuts=st.integers(1, 3))
def test_shared(method: str, case: tuple[Tensor, int, int], cuts: int) -> None:
    weight, true, rank = case
    layers = [part for part in weight.chunk(cuts) if len(part)]
    tall = weight.shape[0] >= weight.shape[1]
    if method == "plain":
        factors = plain_shared(layers, None, rank, weight.dtype, Workspace(), tall=tall)
    else:
        eye = torch.eye(weight.shape[1]).double()
        outers = [outer_statistic(layer, None, tall=tall) for layer in layers]
        inners = [lambda: eye] * len(layers)
        found = decompose_shared(
            [lambda outer=outer: outer for outer in outers], inners, [1] * len(layers), None if tall else layers
        )
        factors = truncate_shared(layers, found.found, rank, weight.dtype, inners, tall=tall)
    up = torch.cat([own.up for own in factors.own])
    assert_sound(weight, true, factors.down, up, ridge=0.0 if method == "plain" else RIDGE)


@settings(max_examples=60)
@given(case=low_rank())
def test_pivoted(case: tuple[Tensor, int, int]) -> None:
    weight, true, rank = case
    (m, n), name = weight.shape, {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[weight.dtype]
    if rank == m:
        rank -= 1
    shapes = {"down": (rank, n), "up": (m - rank, rank), "position": (m,)}
    outputs = tuple(TensorInfo(key, name, shape, None, 0) for key, shape in shapes.items())
    step = Step("factorize", "w", (), outputs, {"rank": rank, "layout": "pivoted"})
    (rows, coefficients, position), report = OPERATIONS["factorize"]([weight], step, Workspace())
    assert sorted(position.tolist()) == list(range(m))
    assert torch.isfinite(rows).all()
    assert float(rows.double().abs().max()) <= 1.01 * float(weight.double().abs().max())
    assert float(coefficients.double().abs().max()) <= 1.1 * LARGEST_COEFFICIENT
    assert not coefficients[:, true:].any()
    error = far(weight, product(rows, coefficients, position))
    assert error <= 8 * ROUNDED * torch.finfo(weight.dtype).eps
    assert report.optimal_error <= report.relative_error


@settings(max_examples=60)
@given(case=low_rank(), noise=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1]), below=st.booleans())
def test_the_optimum_is_never_above_what_was_reached(case: tuple[Tensor, int, int], noise: float, below: bool) -> None:
    """And is right, for float32 matrices that are nearly of low rank; ``below``: at the very rank."""
    exact, true, rank = case
    weight = exact.float()
    weight += (
        noise
        * largest(weight)
        / math.sqrt(weight.numel())
        * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    )
    rank = max(true, 1) if below else rank
    found = factorize(weight, rank, torch.float32)
    values = torch.linalg.svdvals(weight.double())
    best = float(values[rank:].norm() / (values.norm() or 1))
    assert found.optimal_error <= found.relative_error
    assert found.optimal_error == pytest.approx(best, rel=1e-3, abs=1e-6)  # the solver's resolution, in squares


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (1, 1), (20, 30), (30, 20)])
def test_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.zeros(shape, dtype=dtype)
    for left, right in ((None, None), (metric("matrix", shape[0], 1), metric("vector", shape[1], 2))):
        found = factorize(weight, min(shape), dtype, left=left, right=right)
        assert not found.down.any()
        assert not found.up.any()
        assert (found.relative_error, found.optimal_error, found.metric_loss) == (0, 0, 0)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("where", ["left", "right", "both"])
def test_what_metrics_see_nothing_of_is_factored_without_them(shape: tuple[int, int], where: str) -> None:
    """A layer whose calibration text gave zeros must not be lost."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    m, n = shape
    left = metric("matrix", m, 1) if where == "right" else torch.zeros(m, m).double()
    right = metric("matrix", n, 2) if where == "left" else torch.zeros(n, n).double()
    plain, found = factorize(weight, 9, torch.float32), factorize(weight, 9, torch.float32, left=left, right=right)
    assert torch.equal(plain.up @ plain.down, found.up @ found.down)
    assert found.relative_error == plain.relative_error
    assert (found.optimal_error, found.metric_loss) == (0, 0)


@pytest.mark.parametrize("blind", [[0], [0, 1]])
@pytest.mark.parametrize("outputs", [12, 30])
def test_a_shared_layer_that_has_seen_nothing(outputs: int, blind: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, 40, generator=generator) for _ in range(2)]
    rights = [torch.zeros(40, 40).double() if i in blind else metric("matrix", 40, i) for i in range(2)]
    assert all(right is not None for right in rights)
    tall = 2 * outputs >= 40
    outers = [outer_statistic(weight, None, tall=tall) for weight in weights]
    loads = [[lambda value=value: value for value in values] for values in (outers, rights)]
    found = decompose_shared(loads[0], loads[1], [1, 1], None if tall else weights)
    factors = truncate_shared(weights, found.found, 20, torch.float32, loads[1], tall=tall)
    for weight, own in zip(weights, factors.own, strict=True):
        up = own.up
        assert torch.isfinite(up).all()
        assert float((weight - up @ factors.down).norm() / weight.norm()) < 1.0


def test_columns_that_nothing_depends_on_do_not_stop_the_feedback() -> None:
    """A Gram matrix with a zero row is that of a component that is zero: the others are rounded as without it."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    factor[:, 1] = factor[:, 0] + 0.1 * factor[:, 1]
    gram, rows = factor.T @ factor, torch.randn(50, 6, generator=generator, dtype=torch.float64)
    alone = round_with_feedback(rows, gram, torch.bfloat16)
    assert not torch.equal(alone, rows.bfloat16())
    wider = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    padded = round_with_feedback(torch.nn.functional.pad(rows, (0, 1)), wider, torch.bfloat16)
    assert torch.equal(padded[:, :6], alone)


EXTREMES = {
    "svd": [],
    "pivoted": ["--layout", "pivoted"],
    "shared": ["--share-layers", "2"],
    "whiten": ["--method", "whiten"],
    "kfac, pivoted": ["--method", "kfac", "--layout", "pivoted"],
    "whiten, shared": ["--method", "whiten", "--share-layers", "2"],
}
WEIGHT = "gpt_neox.layers.0.attention.dense.weight"


def scaled(folder: Path, factor: float, dtype: torch.dtype) -> Path:
    """A model of two layers, one matrix of which is scaled."""
    tensors = {name: tensor for name, tensor in random_tensors(dtype=dtype).items() if ".layers.2." not in name}
    tensors[WEIGHT] = (tensors[WEIGHT].double() * factor).to(dtype)
    config = {"num_hidden_layers": 2, "torch_dtype": str(dtype)[6:]}
    return write_checkpoint(folder, tensors, config=config)


def words(options: list[str], text: Path) -> list[object]:
    calib = ["--calib", text, "--calib-samples", 4, "--calib-length", 32] if "--method" in options else []
    return ["--rank", 12, *options, *calib, "--device", "cpu", "--out"]


@pytest.mark.parametrize("factor", [1e200, 1e-200])
@pytest.mark.parametrize("options", EXTREMES.values(), ids=EXTREMES)
def test_entries_whose_squares_leave_float64(
    options: list[str], factor: float, run: Callable[..., SimpleNamespace], text: Path, tmp_path: Path
) -> None:
    model = scaled(tmp_path / "model", factor, torch.float64)
    ended = run(model, *words(options, text), tmp_path / "out")
    assert ended.code == 2, ended.err
    assert ended.err.count("Error:") == 1
    assert ended.err.splitlines()[-1].startswith(f"Error: tensor {WEIGHT} ")
    expected = "exceeds the range of torch.float32" if factor > 1 and "--method" in options else "range of float64"
    assert expected in ended.err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 0.0])
@pytest.mark.parametrize("options", EXTREMES.values(), ids=EXTREMES)
def test_small_and_zero_weights(
    options: list[str], factor: float, run: Callable[..., SimpleNamespace], text: Path, tmp_path: Path
) -> None:
    model = scaled(tmp_path / "model", factor, torch.float32)
    ended = run(model, *words(options, text), tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    verified = run("verify", tmp_path / "out", "--against", model)
    assert verified.code == 0, verified.out
    stored = read_weights(tmp_path / "out")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in stored.values())
    if "pivoted" in options or "--share-layers" in options:
        return
    module = WEIGHT.removesuffix(".weight")
    found = stored[f"{module}.up.weight"].double() @ stored[f"{module}.down.weight"].double()
    exact = read_weights(model)[WEIGHT].double()
    assert read_config(tmp_path / "out")["svd_ranks"][module.removeprefix("gpt_neox.")] == 12
    if not factor:
        assert not found.any()
    else:
        assert float((exact / factor - found / factor).norm() / (exact / factor).norm()) < 0.95


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
@pytest.mark.parametrize("method", ["svd", "whiten", "kfac"])
def test_a_refit_of_low_rank_layers(
    layout: str, method: str, run: Callable[..., SimpleNamespace], text: Path, tmp_path: Path
) -> None:
    """Unused ranks stay zeros, and the others are refitted as they are without them."""
    tensors = {name: tensor for name, tensor in random_tensors().items() if ".layers.2." not in name}
    generator = torch.Generator().manual_seed(0)
    names = [name for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2]
    for name in names:  # of rank 6: every row is one of six
        rows = tensors[name][torch.randint(0, 6, (len(tensors[name]),), generator=generator)]
        tensors[name] = rows.contiguous()
    model = write_checkpoint(tmp_path / "model", tensors, config={"num_hidden_layers": 2})
    calib = ["--calib", text, "--calib-samples", 24, "--calib-length", 48, "--calib-batch-size", 8]
    options = ["--rank", 16, "--layout", layout, "--method", method, "--refit", "sequential", "--device", "cpu"]
    ended = run(model, *options, *calib, "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    stored = read_weights(tmp_path / "out")
    for name in names:
        bound = 3 * math.sqrt(largest(tensors[name]))
        down, up = (stored[f"{name.removesuffix('weight')}{half}.weight"].double() for half in ("down", "up"))
        assert float(down.abs().max()) <= bound * (1 if layout == "balanced" else math.sqrt(largest(tensors[name])))
        assert float(up.abs().max()) <= bound
        if layout == "balanced":
            assert not down[6:].any()
            assert not up[:, 6:].any()
    verified = run("verify", tmp_path / "out", "--against", model)
    assert verified.code == 0, verified.out
