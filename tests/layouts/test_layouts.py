"""What every layout has to keep: names, shapes, costs and verbs that agree with each other."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.metrics import dense, loss, metric, normal

from svdconvert.errors import InputError
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import LAYOUTS, layout_named, layout_of, stored_names
from svdconvert.linalg.exact import factorize
from svdconvert.linalg.pivot import rounded_coefficients
from svdconvert.linalg.residual import relative_error

layouts = st.sampled_from(list(LAYOUTS.values()))


def product(m: int, n: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(m, rank, seed=seed), normal(rank, n, seed=seed + 1)


@settings(max_examples=60)
@given(layout=layouts, m=st.integers(2, 30), n=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_stored_tensors_are_as_planned(layout: Layout, m: int, n: int, share: float, seed: int) -> None:
    rank = max(1, round(share * layout.rank_limit((m, n))))
    up, down = product(m, n, rank, seed)
    stored = layout.store(up, down, torch.float64)
    planned = layout.tensors("a.weight", rank, (m, n), "F64")
    assert [tuple(tensor.shape) for tensor in stored] == [info.shape for info in planned]
    assert [info.name for info in planned] == list(layout.names("a.weight"))
    assert layout.outer_shape(planned) == (m, n)
    assert sum(info.size for info in planned if info.dtype == "F64") == layout.cost(rank, (m, n))
    assert [planned[place].shape[axis] for place, axis in layout.rank_axes] == [rank] * len(layout.rank_axis)
    weights = len(layout.weights(rank, (m, n)))
    assert all(tensor.is_floating_point() for tensor in stored[:weights])
    assert all(layout.sound(tensor) for tensor in stored[weights:])


@settings(max_examples=60)
@given(layout=layouts, m=st.integers(2, 30), n=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_verbs_agree(layout: Layout, m: int, n: int, share: float, seed: int) -> None:
    rank = max(1, round(share * layout.rank_limit((m, n))))
    up, down = product(m, n, rank, seed)
    wanted = up @ down
    stored = layout.store(up, down, torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-9 * float(wanted.abs().max())}
    torch.testing.assert_close(layout.product(stored), wanted, **close)
    torch.testing.assert_close(layout.dense(stored).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    taller, wider = layout.factors(stored)
    torch.testing.assert_close(taller.double() @ wider.double(), wanted, **close)
    # another output-side factor beside the input-side one that is stored
    other = taller.double() + normal(m, rank, seed=seed + 2)
    again = layout.refit(stored, other, wider.double() @ wider.double().T, torch.float64)
    torch.testing.assert_close(layout.product(again), other @ wider.double(), rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_any_type_are_stored(layout: Layout, dtype: torch.dtype) -> None:
    up, down = (factor.to(dtype) for factor in product(20, 15, 6, 0))
    wanted = up.double() @ down.double()
    found = layout.product(layout.store(up, down, torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (35, 35)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncations_tell_their_own_error(layout: Layout, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = normal(*shape, seed=3)
    found = layout.truncate(weight, lambda own: factorize(weight, 12, own), dtype, None, None)
    weights = found.tensors[: len(layout.weights(12, shape))]
    assert [tensor.dtype for tensor in weights] == [dtype] * len(weights)
    assert layout.product(found.tensors).dtype == torch.float64
    assert found.relative_error == pytest.approx(relative_error(weight, *layout.factors(found.tensors)), rel=1e-5)
    best = float((torch.linalg.svdvals(weight)[12:].square().sum() / weight.square().sum()).sqrt())
    assert found.optimal_error == pytest.approx(best, rel=1e-5)
    assert best * (1 - 1e-6) <= found.relative_error < best * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("identity", "matrix"), ("vector", "matrix"), ("matrix", "vector")])
def test_the_pivoted_layout_tells_what_rounding_adds(kinds: tuple[str, str], dtype: torch.dtype) -> None:
    m, n, rank = 40, 30, 12
    weight, left, right = normal(m, n, seed=3), metric(kinds[0], m, 1), metric(kinds[1], n, 2)
    found = LAYOUTS["pivoted"].truncate(
        weight, lambda own: factorize(weight, rank, own, left=left, right=right), dtype, left, right
    )
    # The best product: of the matrix between the roots of the metrics, cut off at the rank.
    lefts, rights = torch.linalg.cholesky(dense(left, m)), torch.linalg.cholesky(dense(right, n))
    u, s, v = torch.linalg.svd(lefts.T @ weight @ rights)
    inner = (u[:, :rank] * s[:rank]) @ v[:rank]
    best = torch.linalg.solve(lefts.T, torch.linalg.solve(rights, inner, left=False))
    rows, coefficients, position = found.tensors
    stored = torch.cat([rows.double(), coefficients.double() @ rows.double()])[position]
    assert found.optimal_error == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-9)
    added = loss(best, stored, dense(left, m), dense(right, n))
    assert found.rounding_excess == pytest.approx(added / float(s[rank:].square().sum()), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("outputs", [False, True])
def test_the_least_error_is_that_in_the_metric(outputs: bool) -> None:
    """Though the error of the weights themselves is smaller here."""
    weighing = metric("outliers", 30, 2)
    assert weighing is not None
    root = torch.linalg.cholesky(weighing)
    seen = normal(40, 30, seed=3)  # as the metric sees it
    weight = torch.linalg.solve(root, seen, left=False)
    left, right = (weighing, None) if outputs else (None, weighing)
    if outputs:
        weight = weight.T.contiguous()
    found = LAYOUTS["pivoted"].truncate(
        weight, lambda own: factorize(weight, 12, own, left=left, right=right), torch.float32, left, right
    )
    s = torch.linalg.svdvals(seen)
    assert found.optimal_error == pytest.approx(float(s[12:].norm() / s.norm()), rel=1e-6)
    assert found.relative_error < 0.99 * found.optimal_error


@pytest.mark.parametrize("shape", [(40, 30), (30, 30), (30, 40)])
def test_coefficients_are_fitted_to_what_the_metric_can_judge(shape: tuple[int, int]) -> None:
    """To the matrix where its inputs are the smaller side; to the product where their metric may be a diagonal only."""
    weight, right = normal(*shape, seed=3), metric("vector", shape[1], 2)
    factors = factorize(weight, 12, torch.float64, right=right)
    wanted = factors.up @ factors.down if shape[0] < shape[1] else weight
    found = LAYOUTS["pivoted"].truncate(weight, lambda own: factors, torch.bfloat16, None, right)
    rows, coefficients, position = found.tensors
    assert torch.equal(coefficients, rounded_coefficients(wanted, rows, position, right, torch.bfloat16))
    other = weight + factors.up @ factors.down - wanted
    assert not torch.equal(coefficients, rounded_coefficients(other, rows, position, right, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_a_product_without_loss_has_no_excess_to_tell(layout: Layout) -> None:
    """What is added to a loss is not told where there is none, and however small a loss is, it is told."""
    weight = normal(20, 15, seed=3)
    for scale, rank, told in ((0.0, 5, False), (1e-4, 5, True), (1.0, 5, True)):
        found = layout.truncate(
            scale * weight, lambda own, of=scale * weight, at=rank: factorize(of, at, own), torch.bfloat16, None, None
        )
        assert (found.rounding_excess is not None) == told


@settings(max_examples=30)
@given(r=st.integers(2, 20), seed=st.integers(0, 99))
def test_a_refit_beside_a_kept_factor_is_rounded_in_its_metric(r: int, seed: int) -> None:
    """To 16 bits with feedback, never worse than to the nearest and mostly better; to 32 bits to the nearest."""
    layout, m, n = LAYOUTS["balanced"], 40, 24
    stored = layout.store(*product(m, n, r, seed), torch.bfloat16)
    up, mixed = normal(m, r, seed=seed + 2), normal(r, r, seed=seed + 3)
    gram = mixed @ mixed.T + 1e-3 * torch.eye(r)
    rounded = layout.refit(stored, up, gram, torch.bfloat16)
    assert rounded[0] is stored[0]

    def cost(found: torch.Tensor) -> float:
        return float(((found.double() - up) @ gram * (found.double() - up)).sum())

    assert cost(rounded[1]) <= cost(up.bfloat16()) * (1 + 1e-12)
    assert torch.equal(layout.refit(stored, up, gram, torch.float32)[1], up.float())


@settings(max_examples=60)
@given(layout=layouts, m=st.integers(2, 60), n=st.integers(1, 60))
def test_break_even_is_where_nothing_is_saved(layout: Layout, m: int, n: int) -> None:
    even, by_search = layout.break_even((m, n)), Layout.break_even(layout, (m, n))
    for rank in range(1, min(m, n) + 1):
        assert (layout.cost(rank, (m, n)) < m * n) == (rank < even) == (rank < by_search)
    assert layout.highest_rank((m, n), m * n - 1) == max((r for r in range(1, min(m, n) + 1) if r < even), default=0)


def test_names_in_a_checkpoint() -> None:
    config = {"svd_layout": "pivoted"}
    assert LAYOUTS["balanced"].bias_name("a.bias") == "a.up.bias"
    assert LAYOUTS["pivoted"].bias_name("a.bias") == "a.bias"
    assert layout_of(config) is LAYOUTS["pivoted"]
    assert layout_of({}) is LAYOUTS["balanced"]
    assert stored_names(config, "m.", "a") == ("m.a.down.weight", "m.a.up.weight", "m.a.position")
    shared = {"svd_shared": {"b": "a"}}
    assert stored_names(shared, "m.", "b") == ("m.a.down.weight", "m.b.up.weight")
    with pytest.raises(InputError, match="choose balanced or pivoted") as caught:
        layout_named("diagonal")
    assert caught.value.fields == ("layout",)


def test_positions_are_permutations() -> None:
    pivoted = LAYOUTS["pivoted"]
    assert pivoted.sound(torch.tensor([2, 0, 1]))
    assert pivoted.sound(torch.tensor([2, 0, 1], dtype=torch.int32))
    for wrong in ([0, 0, 1], [1, 2, 3], [-1, 0, 1]):
        assert not pivoted.sound(torch.tensor(wrong))
    assert not pivoted.sound(torch.tensor([2.0, 0.0, 1.0]))


def test_tables_need_no_torch() -> None:
    program = "import sys, svdconvert.layouts.table, svdconvert.solvers.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
