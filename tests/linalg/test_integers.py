"""Integer grids against textbook forms in float64, exhaustive search, and words written out as one long number."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metrics import normal

from svdconvert.errors import InputError
from svdconvert.grids import Grid
from svdconvert.linalg.descent import descend
from svdconvert.linalg.feedback import Feedback
from svdconvert.linalg.integers import Rounded, nearest, pack, unpack

GRIDS = [Grid(8), Grid(6, 8), Grid(4, 32), Grid(4), Grid(3, 16), Grid(2, 96)]


# What ``pack_to_int32`` of compressed-tensors 0.20.1 gives for the integers of the test.
GOLDEN = {3: [[-1468477784, 14], [-1930786932, 7]], 6: [[1619912796, -396591577, 141], [1551771488, 660639208, 126]]}


def correlated(n: int, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs with an offset and of unequal sizes."""
    inputs = normal(3 * n, n, seed=seed) * normal(1, n, seed=seed + 1).exp() + 2 * normal(3 * n, 1, seed=seed + 2)
    return inputs.T @ inputs / len(inputs)


def costs(weight: torch.Tensor, rounded: Rounded, gram: torch.Tensor) -> torch.Tensor:
    error = rounded.values(torch.float64) - weight
    return torch.einsum("ij,jk,ik->i", error, gram, error)


def groups(matrix: torch.Tensor, grid: Grid) -> torch.Tensor:
    return matrix.view(matrix.shape[0], -1, grid.group or matrix.shape[1])


@settings(max_examples=60)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 100), seed=st.integers(0, 999))
def test_rows_are_packed_as_one_long_number(bits: int, rows: int, columns: int, seed: int) -> None:
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == Grid(bits).words((rows, columns))
    for row, stored in zip(codes.tolist(), words, strict=True):
        number = sum((code + half) << (bits * place) for place, code in enumerate(row))
        assert stored.numpy().astype("<i4").tobytes() == number.to_bytes(4 * len(stored), "little")
    assert torch.equal(unpack(words, bits, columns), codes)


def test_words_of_compressed_tensors() -> None:
    """``pack_to_int32`` of compressed-tensors 0.20.1 on the same integers."""
    codes = (torch.arange(24).view(2, 12) * 5 % 8 - 4).to(torch.int8)
    assert pack(codes, 3).tolist() == GOLDEN[3]
    assert pack(codes, 6).tolist() == GOLDEN[6]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nearest(grid: Grid, dtype: torch.dtype) -> None:
    weight, importance = normal(20, 96), normal(96, seed=1).square()
    found = nearest(weight, grid, dtype, importance)
    assert found.codes.dtype == torch.int8
    assert found.scales.dtype == dtype
    assert tuple(found.scales.shape) == grid.scales((20, 96))
    assert found.codes.min() >= -grid.largest - 1
    assert found.codes.max() <= grid.largest
    exact, codes = groups(weight, grid), groups(found.codes.double(), grid)
    scales, counts = found.scales.double()[..., None], groups(importance[None], grid)
    error = codes * scales - exact
    # No neighbouring integer is nearer.
    for other in (codes - 1, codes + 1):
        inside = (other >= -grid.largest - 1) & (other <= grid.largest)
        assert bool(((other * scales - exact).abs() >= error.abs())[inside].all())
    # The usual scale, and the same without a weight for each input.
    usual = (exact.abs().amax(-1, keepdim=True) / grid.largest).to(dtype).double()
    theirs = (exact / usual).round().clamp(-grid.largest - 1, grid.largest) * usual - exact
    ours = error.square().mul(counts).sum(-1)
    assert bool((ours <= theirs.square().mul(counts).sum(-1) * (1 + 1e-12)).all())
    plain = costs(weight, nearest(weight, grid, dtype), importance.diag()).sum()
    assert ours.sum() <= plain * (1 + 1e-12)
    assert ours.sum() < 0.95 * theirs.square().mul(counts).sum() or grid.bits > 4


def test_a_search_of_the_scale_is_near_the_best_there_is() -> None:
    weight, grid = normal(50, 16), Grid(3, 16)
    steps = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None, None] * weight.abs().amax(1, keepdim=True)
    codes = (weight / steps).round().clamp(-4, 3)
    best = (codes * steps - weight).square().sum(-1).nan_to_num(torch.inf).amin(0)
    ours = costs(weight, nearest(weight, grid, torch.float32), torch.eye(16, dtype=torch.float64))
    assert ours.sum() < 1.1 * best.sum()


def gptq(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, dtype: torch.dtype) -> Rounded:
    """Optimal brain quantisation of the GPTQ paper, largest moments first: H^-1 with columns taken out one by one."""
    order = gram.diagonal().argsort(descending=True)
    wanted, sorted_gram = weight[:, order].clone(), gram[order][:, order]
    inverse = torch.linalg.inv(sorted_gram)
    # What an error in a column costs once all later ones may make up for it.
    own = torch.empty(len(gram), dtype=torch.float64)
    own[order] = torch.stack([1 / torch.linalg.inv(sorted_gram[j:, j:])[0, 0] for j in range(len(gram))])
    scales = nearest(weight, grid, dtype, own).scales
    steps = scales.double().repeat_interleave(grid.group or weight.shape[1], dim=1)
    codes = torch.empty_like(weight)
    for j, place in enumerate(order):
        codes[:, place] = (wanted[:, j] / steps[:, place]).round().clamp(-grid.largest - 1, grid.largest)
        error = (wanted[:, j] - codes[:, place] * steps[:, place]) / inverse[j, j]
        wanted -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
    return Rounded(codes.to(torch.int8), scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_feedback_is_gptq(grid: Grid) -> None:
    weight, gram = normal(12, 96), correlated(96)
    ours = Feedback(gram).round(weight, grid, torch.bfloat16)
    plain = nearest(weight, grid, torch.bfloat16, gram.diagonal())
    theirs = gptq(weight, gram, grid, torch.bfloat16)
    better = costs(weight, theirs, gram) < costs(weight, plain, gram)
    assert better.sum() > 6
    assert torch.equal(ours.codes[better], theirs.codes[better])
    assert torch.equal(ours.scales[better], theirs.scales[better])
    assert costs(weight, ours, gram).sum() < 0.7 * costs(weight, plain, gram).sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_descent_ends_where_no_single_move_helps(grid: Grid) -> None:
    weight, gram = normal(12, 96), correlated(96)
    start = Feedback(gram).round(weight, grid, torch.bfloat16)
    found = descend(weight, start, gram, grid, sweeps=200)
    least, group = costs(weight, found, gram), grid.group or 96
    assert bool((least <= costs(weight, start, gram) * (1 + 1e-12)).all())
    assert least.sum() < 0.995 * costs(weight, start, gram).sum() or grid.bits == 8
    assert found.codes.min() >= -grid.largest - 1
    assert found.codes.max() <= grid.largest
    for column in range(96):
        for change in (-1, 1):
            codes = found.codes.clone()
            codes[:, column] = (codes[:, column] + change).clamp(-grid.largest - 1, grid.largest)
            assert bool((costs(weight, Rounded(codes, found.scales), gram) >= least * (1 - 1e-12)).all())
    for column in range(96 // group):
        for change in (1 - 2**-8, 1 + 2**-7):  # the neighbours in bfloat16, or beyond
            scales = found.scales.clone()
            scales[:, column] *= change
            assert bool((costs(weight, Rounded(found.codes, scales), gram) >= least * (1 - 1e-12)).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweeps_never_lose(grid: Grid, dtype: torch.dtype) -> None:
    """Beside an input ten thousand times as large as the others, where float32 is a little off."""
    weight, gram = normal(12, 96), correlated(96)
    large = torch.ones(96, dtype=torch.float64)
    large[7] = 1e4
    gram = gram * large * large[:, None]
    feedback = Feedback(gram)
    before, after = (feedback.round(weight.to(dtype), grid, torch.float16, sweeps) for sweeps in (0, 3))
    assert bool((costs(weight, after, gram) <= costs(weight, before, gram) * (1 + 1e-3)).all())
    assert costs(weight, after, gram).sum() < costs(weight, before, gram).sum()


def test_feedback_between_the_nearest_and_the_best_of_all() -> None:
    weight, gram, grid = normal(30, 5), correlated(5), Grid(2)
    found = Feedback(gram).round(weight, grid, torch.float32)
    every = torch.tensor(list(product(range(-2, 2), repeat=5)), dtype=torch.float64)
    errors = every * found.scales.double()[:, None] - weight[:, None]
    best = torch.einsum("ikj,jl,ikl->ik", errors, gram, errors).amin(1)
    ours = costs(weight, found, gram)
    assert bool((best <= ours * (1 + 1e-12)).all())
    assert ours.sum() < (best.sum() + costs(weight, nearest(weight, grid, torch.float32), gram).sum()) / 2


@settings(max_examples=60)
@given(
    bits=st.integers(2, 8), count=st.integers(1, 5), group=st.integers(1, 40), samples=st.integers(1, 250),
    per_row=st.booleans(), seed=st.integers(0, 999), size=st.sampled_from([1e-4, 1.0, 1e3]),
)  # fmt: skip
def test_feedback_is_never_worse_than_the_nearest(
    bits: int, count: int, group: int, samples: int, per_row: bool, seed: int, size: float
) -> None:
    n, grid = count * group, Grid(bits, 0 if per_row else group)
    weight, inputs = size * normal(6, n, seed=seed), normal(samples, n, seed=seed + 1) + 3
    weight[0] = 0
    inputs[:, 0] = 0
    gram = inputs.T @ inputs  # singular
    ours = costs(weight, Feedback(gram).round(weight, grid, torch.float16), gram)
    plain = nearest(weight, grid, torch.float16, gram.diagonal())
    theirs, alone = costs(weight, plain, gram), costs(weight, plain, gram.diagonal().diag())
    # A singular metric has a little added to its diagonal.
    assert bool((ours <= theirs + 1e-7 * alone.sum()).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("way", ["nearest", "feedback"])
def test_rows_of_one_value(grid: Grid, way: str) -> None:
    weight = torch.tensor([0.0, 1.0, -3.0, 2**-40]).repeat_interleave(96).view(4, 96)

    def rounded(dtype: torch.dtype) -> torch.Tensor:
        if way == "nearest":
            return nearest(weight, grid, dtype).values(torch.float64)
        return Feedback(correlated(96)).round(weight, grid, dtype).values(torch.float64)

    assert torch.equal(rounded(torch.float32)[0], torch.zeros(96, dtype=torch.float64))
    assert torch.allclose(rounded(torch.float32), weight.double(), rtol=0.02)
    # What float16 cannot tell from nothing is zeros.
    assert not bool(rounded(torch.float16)[3].any())


@pytest.mark.parametrize("value", [1e7, torch.inf, torch.nan])
def test_scales_beyond_their_type(value: float) -> None:
    weight = normal(4, 32)
    weight[1, 5] = value
    for round_it in (lambda: nearest(weight, Grid(4, 16), torch.float16),
                     lambda: Feedback(correlated(32)).round(weight, Grid(4, 16), torch.float16)):  # fmt: skip
        with pytest.raises(InputError, match="a scale of it is not finite in float16"):
            round_it()


def test_stored_tensors() -> None:
    found, grid = nearest(normal(6, 64), Grid(5, 32), torch.bfloat16), Grid(5, 32)
    tensors = found.tensors(grid.bits)
    infos = grid.tensors("a.weight", (6, 64), "BF16")
    assert [tuple(tensor.shape) for tensor in tensors] == [info.shape for info in infos]
    assert [tensor.dtype for tensor in tensors] == [torch.int32, torch.bfloat16, torch.int64]
    again = Rounded(unpack(tensors[0], grid.bits, int(tensors[2][1])), tensors[1])
    assert torch.equal(again.values(torch.float64), found.values(torch.float64))
    # float32 holds the products of 8 bits and bfloat16's 8
    assert torch.equal(found.values(torch.float32).double(), found.values(torch.float64))
