"""One input-side factor for several layers: the solver's laws, and whole conversions against recipes in memory."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import LINEARS, TARGETS, read_config, read_weights, tree, write_checkpoint
from support.methods import gradients
from support.metrics import dense as full
from support.metrics import metric, normal, root
from support.results import products
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, InputError, convert, plan
from svdconvert.commands.verify import failed, verify
from svdconvert.factoring import decomposer
from svdconvert.linalg.exact import decompose, factorize
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.shared import (
    SharedDecomposition,
    decompose_shared,
    outer_statistic,
    plain_shared,
    truncate_shared,
)
from svdconvert.planning.ranks import Target, assign
from svdconvert.planning.steps import Step, files_here
from svdconvert.planning.targets import share
from svdconvert.settings.size import Size
from svdconvert.tensors import TensorInfo

Run = Callable[..., SimpleNamespace]
Tensors = list[torch.Tensor]

# Outputs of each layer, and inputs: tall stacks of wide and of tall matrices, and wide stacks.
STACKS = [((24, 24), 24), ((40, 10, 30), 20), ((12, 12, 12), 30), ((20, 9), 48), ((30,), 20), ((20,), 30)]


def is_tall(weights: Sequence[torch.Tensor]) -> bool:
    return sum(weight.shape[0] for weight in weights) >= weights[0].shape[1]


def solve(weights: Tensors, lefts: list[Any], rights: Tensors, tokens: list[int] | None = None) -> SharedDecomposition:
    tall = is_tall(weights)
    outers = [outer_statistic(weight, left, tall=tall) for weight, left in zip(weights, lefts, strict=True)]
    loads = [[partial(lambda value: value, value) for value in values] for values in (outers, rights)]
    return decompose_shared(loads[0], loads[1], tokens or [1] * len(weights), None if tall else weights)


def cut(
    weights: Sequence[torch.Tensor], found: SharedDecomposition, rank: int, rights: Tensors, tall: bool | None = None
) -> tuple[torch.Tensor, Tensors]:
    inners = [partial(lambda value: value, value) for value in rights]
    tall = is_tall(weights) if tall is None else tall
    factors = truncate_shared(weights, found.found, rank, torch.float64, inners, tall=tall)
    return factors.down, [own.up for own in factors.own]


def losses(weights: Tensors, down: torch.Tensor, ups: Tensors, lefts: list[Any], rights: Tensors) -> list[float]:
    result = []
    for weight, up, left, right in zip(weights, ups, lefts, rights, strict=True):
        error = weight - up @ down
        result.append(float((full(left, weight.shape[0]) @ error @ full(right, weight.shape[1]) * error).sum()))
    return result


def matrices(outputs: tuple[int, ...], inputs: int, seed: int = 0) -> Tensors:
    return [normal(rows, inputs, seed=seed + i) for i, rows in enumerate(outputs)]


@pytest.mark.parametrize(("outputs", "inputs"), STACKS)
@pytest.mark.parametrize("left", ["identity", "vector", "matrix", "outliers", "singular"])
@pytest.mark.parametrize("right", ["vector", "matrix", "outliers", "singular"])
def test_loss_is_the_tail_of_the_stacked_spectrum(outputs: tuple[int, ...], inputs: int, left: str, right: str) -> None:
    """One metric on the inputs of all layers: the stack, L^1/2 in blocks, by a full SVD in float64."""
    weights = matrices(outputs, inputs)
    lefts = [metric(left, rows, 10 + i) for i, rows in enumerate(outputs)]
    rights = [metric(right, inputs, 5)] * len(outputs)
    blocks = torch.block_diag(*(root(full(value, rows)) for value, rows in zip(lefts, outputs, strict=True)))
    spectrum = torch.linalg.svdvals(blocks @ torch.cat(weights) @ root(full(rights[0], inputs))).square()
    scale = float(spectrum.sum())
    found = solve(weights, lefts, rights)
    assert torch.allclose(found.captured.sum(0), spectrum, rtol=1e-5, atol=1e-8 * scale)
    assert torch.equal(found.found.spectrum, found.captured.sum(0))
    for rank in (1, len(spectrum) // 2, len(spectrum) - 1):
        down, ups = cut(weights, found, rank, rights)
        measured = losses(weights, down, ups, lefts, rights)
        assert sum(measured) == pytest.approx(float(spectrum[rank:].sum()), rel=1e-4, abs=2e-6 * scale)


@pytest.mark.parametrize(("outputs", "inputs"), STACKS)
@pytest.mark.parametrize("left", ["identity", "vector", "matrix"])
def test_each_layer_is_fitted_in_its_own_metric(outputs: tuple[int, ...], inputs: int, left: str) -> None:
    """And what a rank leaves in each of them is known before it is cut."""
    weights = matrices(outputs, inputs)
    lefts = [metric(left, rows, 10 + i) for i, rows in enumerate(outputs)]
    rights = [metric("matrix", inputs, 20 + i) for i in range(len(outputs))]
    found = solve(weights, lefts, rights, tokens=[100 * (i + 1) for i in range(len(outputs))])
    for rank in (1, min(sum(outputs), inputs) // 2, min(sum(outputs), inputs) - 1):
        down, ups = cut(weights, found, rank, rights)
        for i, measured in enumerate(losses(weights, down, ups, lefts, rights)):
            whole = float(found.captured[i].sum())
            assert measured == pytest.approx(float(found.captured[i, rank:].sum()), rel=1e-4, abs=1e-6 * whole)
            # the normal equations: what is left is orthogonal to the rows of A
            rest = (weights[i] - ups[i] @ down) @ rights[i] @ down.T
            assert float(rest.norm()) < 1e-4 * float((weights[i] @ rights[i] @ down.T).norm())


@given(
    rows=st.integers(1, 30),
    inputs=st.integers(1, 30),
    fraction=st.floats(0.01, 1),
    left=st.sampled_from(["identity", "vector", "matrix"]),
    right=st.sampled_from(["vector", "matrix"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_a_group_of_one_is_the_layer_itself(
    rows: int, inputs: int, fraction: float, left: str, right: str, seed: int
) -> None:
    weight, lefts, rights = (
        normal(rows, inputs, seed=seed),
        metric(left, rows, seed + 1),
        metric(right, inputs, seed + 2),
    )
    rank = max(1, round(fraction * min(rows, inputs)))
    found = solve([weight], [lefts], [rights])
    down, (up,) = cut([weight], found, rank, [rights])
    alone = factorize(weight, rank, torch.float64, left=lefts, right=rights)
    scale = float(found.captured.sum())
    (measured,) = losses([weight], down, [up], [lefts], [rights])
    assert measured == pytest.approx(alone.metric_loss, rel=1e-4, abs=1e-5 * scale)
    spectrum = decompose(weight, left=lefts, right=rights).spectrum
    assert torch.allclose(found.found.spectrum, spectrum, rtol=1e-4, atol=1e-7 * scale)


@given(
    copies=st.integers(2, 4),
    rows=st.integers(2, 20),
    inputs=st.integers(2, 40),
    kind=st.sampled_from(["plain", "vector", "matrix"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_equal_layers_lose_nothing_by_sharing(copies: int, rows: int, inputs: int, kind: str, seed: int) -> None:
    weight, rank = normal(rows, inputs, seed=seed), max(1, min(rows, inputs) // 2)
    right = None if kind == "plain" else metric(kind, inputs, seed + 1)
    alone = factorize(weight, rank, torch.float64, right=right)
    weights = [weight] * copies
    if right is None:
        factors = plain_shared(weights, None, rank, torch.float64, Workspace(), tall=is_tall(weights))
        own = list(factors.own)
        down, ups = factors.down, [one.up for one in own]
        errors = [(one.loss / one.energy) ** 0.5 for one in own]
        assert errors == pytest.approx([alone.relative_error] * copies, rel=1e-4, abs=1e-5)
    else:
        down, ups = cut(weights, solve(weights, [None] * copies, [right] * copies), rank, [right] * copies)
    loss = float((full(right, inputs) @ (weight - alone.up @ alone.down).T * (weight - alone.up @ alone.down).T).sum())
    whole = float((full(right, inputs) @ weight.T * weight.T).sum())
    measured = losses(weights, down, ups, [None] * copies, [full(right, inputs)] * copies)
    assert measured == pytest.approx([loss] * copies, rel=1e-4, abs=1e-5 * whole)


@pytest.mark.parametrize(("outputs", "inputs"), STACKS)
def test_plain_factors_are_those_of_the_stack(outputs: tuple[int, ...], inputs: int) -> None:
    weights = matrices(outputs, inputs)
    stack, rank = torch.cat(weights), min(sum(outputs), inputs) // 2
    spectrum = torch.linalg.svdvals(stack).square()
    for found in (None, decompose(stack)):
        factors = plain_shared(weights, found, rank, torch.float64, Workspace(), tall=is_tall(weights))
        left = 0.0
        for weight, own in zip(weights, factors.own, strict=True):
            loss = float((weight - own.up @ factors.down).norm()) ** 2
            assert own.loss == pytest.approx(loss, rel=1e-9)
            assert own.energy == pytest.approx(float(weight.norm()) ** 2, rel=1e-9)
            left += loss
        assert left == pytest.approx(float(spectrum[rank:].sum()), rel=1e-5)


class OneBuffer(Sequence[torch.Tensor]):
    """Matrices of which one is there at a time, in memory that the next one is read into."""

    def __init__(self, weights: Tensors) -> None:
        self.weights, self.reads = weights, 0
        self.buffer = torch.full((max(weight.numel() for weight in weights),), torch.nan, dtype=torch.float64)
        self.place = -1

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, place: Any) -> Any:
        weight = self.weights[place]
        if place != self.place:
            self.place, self.reads = place, self.reads + 1
            self.buffer.fill_(torch.nan)[: weight.numel()].copy_(weight.reshape(-1))
        return self.buffer[: weight.numel()].view(weight.shape)


@pytest.mark.parametrize("size", [1e-8, 1, 1e8])
@pytest.mark.parametrize("lowest", [0.1, 1e-5])
@pytest.mark.parametrize(("outputs", "inputs"), [((24, 24, 30), 24), ((40, 10, 30), 20), ((12, 12, 5), 30)])
def test_one_plain_matrix_at_a_time(outputs: tuple[int, ...], inputs: int, lowest: float, size: float) -> None:
    """Against a full SVD of the stack in float64. A tall one is read once to sum up and once for the factors, and once
    more where it has to be scaled, or for float64."""
    stack = normal(sum(outputs), inputs, seed=1)
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    s, rank = torch.logspace(0, math.log10(lowest), len(s), dtype=torch.float64), len(s) - 4
    weights = [part.contiguous() for part in (size * (u * s) @ v).split(outputs)]
    best = size * (u[:, :rank] * s[:rank]) @ v[:rank]
    tall, there = is_tall(weights), OneBuffer(weights)
    factors = plain_shared(there, None, rank, torch.float64, Workspace(), tall=tall)
    for own, weight, part in zip(factors.own, weights, best.split(outputs), strict=True):
        assert float((own.up @ factors.down - part).norm()) < 2e-4 * size * float(s[rank])
        assert own.loss == pytest.approx(float((weight - part).norm()) ** 2, rel=1e-5)
    assert factors.precision == ("float64" if lowest < 0.01 else "float32")
    passes = 2 + (size != 1) + (lowest < 0.01) if tall else 1
    assert there.reads == passes * len(weights)


@pytest.mark.parametrize(("outputs", "inputs"), STACKS)
def test_one_matrix_in_its_metric_at_a_time(outputs: tuple[int, ...], inputs: int) -> None:
    """Two times, with the same factors to the bit; they are W R A^T (A R A^T)^-1."""
    weights = matrices(outputs, inputs)
    rights = [metric("matrix", inputs, 20 + i) for i in range(len(outputs))]
    found, rank = solve(weights, [None] * len(outputs), rights), max(1, min(sum(outputs), inputs) // 2)
    there = OneBuffer(weights)
    down, ups = cut(there, found, rank, rights, tall=is_tall(weights))
    assert there.reads == (2 if len(weights) > 1 else 1) * len(weights)
    plain, others = cut(weights, found, rank, rights)
    assert torch.equal(down, plain)
    for weight, up, other, right in zip(weights, ups, others, rights, strict=True):
        assert torch.equal(up, other)
        exact = weight @ right @ down.T @ torch.linalg.inv(down @ right @ down.T)
        assert float((up - exact).norm()) < 1e-4 * float(exact.norm())


def test_what_one_layer_has_not_seen_is_taken_from_the_others() -> None:
    """A layer whose text never reached some inputs must not get factors that explode there."""
    weights = matrices((30, 30), 20)
    seen = metric("matrix", 20, 1)
    blind = torch.zeros(20, 20, dtype=torch.float64)
    blind[:5, :5] = seen[:5, :5]
    found = solve(weights, [None, None], [seen, blind])
    down, ups = cut(weights, found, 15, [seen, blind])
    assert all(float(up.norm()) < 100 * float(ups[0].norm()) for up in ups)
    measured = losses(weights, down, ups, [None, None], [seen, blind])
    assert measured[1] < 1e-4 * float(found.captured[1].sum())


@pytest.mark.parametrize(("outputs", "inputs"), STACKS)
def test_known_losses_are_no_rounding_errors(outputs: tuple[int, ...], inputs: int) -> None:
    """The first layer has seen a few different inputs alone, each again and again with the last digits of float32 off:
    processors differ in no more than the order of sums, and what is told of a rank must not depend on that."""
    weights, distinct = matrices(outputs, inputs), max(inputs // 3, 1)
    few = normal(distinct, inputs, seed=30).repeat(40, 1)
    few = (few * (1 + 6e-8 * normal(*few.shape, seed=31))).float().double()
    tails = []
    for seed in range(3):
        order = torch.randperm(len(few), generator=torch.Generator().manual_seed(seed))
        own = few[order].T @ few[order] / len(few)
        rights = [own, *(metric("matrix", inputs, 20 + i) for i in range(1, len(outputs)))]
        found = solve(weights, [None] * len(outputs), rights)
        whole = float(found.captured[0].sum())
        assert whole == pytest.approx(float((weights[0] @ own * weights[0]).sum()), rel=1e-9)
        tails.append((found.captured[0].flip(0).cumsum(0).flip(0) / whole).sqrt())
        for rank in (max(1, min(sum(outputs), inputs) // 2), min(sum(outputs), inputs) - 1):
            down, ups = cut(weights, found, rank, rights)
            measured = losses(weights[:1], down, ups[:1], [None], rights[:1])[0]
            assert float(tails[-1][rank]) == pytest.approx((measured / whole) ** 0.5, rel=1e-5, abs=2e-5)
    for tail in tails[1:]:
        assert torch.allclose(tail, tails[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("own", [True, False])
def test_factors_beyond_float16_are_refused(own: bool) -> None:
    """``own``: only those of the layers, as what they share is spread over all inputs; else what they share."""
    weights = [torch.zeros(24, 64), torch.zeros(24, 64)]
    for weight in weights:
        weight[0 if own else slice(None), slice(None) if own else 0] = 1e9
    inners: list[Callable[[], torch.Tensor]] = [lambda: torch.eye(64).double()] * 2
    outers = [partial(outer_statistic, weight, None, tall=False) for weight in weights]
    found = decompose_shared(outers, inners, [1, 1], weights).found
    factors = truncate_shared(weights, found, 1, torch.float32, inners, tall=False)
    most = torch.finfo(torch.float16).max
    assert (float(factors.down.abs().max()) > most) != own
    assert (float(torch.cat([one.up for one in factors.own]).abs().max()) > most) == own
    with pytest.raises(InputError, match=r"not finite in float16; choose dtype='bfloat16' or float32"):
        list(truncate_shared(weights, found, 1, torch.float16, inners, tall=False).own)


def test_layers_of_nothing() -> None:
    weights = [torch.zeros(6, 4, dtype=torch.float64), normal(6, 4)]
    rights = [metric("matrix", 4, i) for i in range(2)]
    down, ups = cut(weights, solve(weights, [None, None], rights), 2, rights)
    assert not ups[0].any()
    assert torch.isfinite(down).all()
    nothing = [torch.zeros(6, 4, dtype=torch.float64)] * 2
    down, ups = cut(nothing, solve(nothing, [None, None], rights), 2, rights)
    assert torch.isfinite(down).all()
    assert not any(up.any() for up in ups)
    with pytest.raises(InputError, match="NaN or infinite"):
        outer_statistic(torch.full((3, 2), torch.nan), None, tall=True)


# --- groups


def group(targets: list[Target], layers: int) -> list[list[str]]:
    tensors = {target.weight: TensorInfo(target.weight, "F32", target.shape) for target in targets}
    return [[part.module for part in target.parts] for target in share(targets, layers, tensors)]


def single(layer: int, name: str = "mlp.x", inputs: int = 4) -> Target:
    return Target(f"layers.{layer}.{name}", f"layers.{layer}.{name}.weight", (8, inputs))


@given(layers=st.integers(1, 12), count=st.integers(1, 30))
def test_groups_of_so_many_layers(layers: int, count: int) -> None:
    found = group([single(i) for i in range(count)], layers)
    assert [module for modules in found for module in modules] == [single(i).module for i in range(count)]
    assert [len(modules) for modules in found] == [layers] * (count // layers) + [count % layers] * (count % layers > 0)


def test_only_what_belongs_together_shares() -> None:
    targets = [single(0), single(0, "mlp.y"), single(1), single(1, "mlp.y"), single(3), single(4, inputs=5), single(5)]
    names = [[f"layers.{n}" for n in (0, 1)], ["layers.3"], ["layers.4"], ["layers.5"]]
    assert group(targets, 2) == [
        [f"{name}.mlp.x" for name in names[0]],
        ["layers.0.mlp.y", "layers.1.mlp.y"],
        *([f"{name}.mlp.x" for name in part] for part in names[1:]),
    ]


def test_a_group_costs_its_factor_once() -> None:
    targets = [single(n) for n in range(3)]
    tensors = {target.weight: TensorInfo(target.weight, "F32", target.shape) for target in targets}
    (together,) = assign(share(targets, 3, tensors), Size(rank=2), 0)
    assert together.params == 2 * (4 + 3 * 8)
    assert together.dense_params == 3 * 4 * 8
    assert together.break_even == pytest.approx(24 * 4 / 28)
    (dense,) = assign(share(targets, 3, tensors), Size(rank=4), 0)
    assert dense.rank is None


def test_files_of_a_step_are_here_together() -> None:
    def step(*names: str) -> Step:
        return Step("copy", "-".join(names), tuple(TensorInfo(name, "F32", (1,), name) for name in names), ())

    assert files_here([]) == 2
    assert files_here([step("a"), step("b"), step("c"), step("d")]) == 2
    assert files_here([step("a"), step("b"), step("a", "b", "c"), step("d")]) == 3
    assert files_here([step("a"), step("b"), step("c"), step("b", "d", "e"), step("a")]) == 4


# --- conversions


@pytest.mark.parametrize(
    ("method", "layers"), [("svd", 2), ("svd", 5), ("asvd", 3), ("fwsvd", 3), ("whiten", 2), ("kfac", 2)]
)
def test_every_method_gives_a_model(
    method: str,
    layers: int,
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    text = None if method == "svd" else calibration
    out = tmp_path / "out"
    report = convert(dense, out, keep=0.5, method=method, calibration=text, share_layers=layers, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.num_parameters() == report.plan.params_after
    config = read_config(out)
    owners = [0, 0, 2] if layers == 2 else [0, 0, 0]
    shared = {f"layers.{n}.{name}": f"layers.{owner}.{name}" for n, owner in enumerate(owners) for name in LINEARS}
    assert config["svd_shared"] == {
        path: owner for path, owner in shared.items() if path != owner and path in config["svd_ranks"]
    }
    record = json.loads((out / "svdconvert.json").read_text())
    assert record["settings"]["share_layers"] == layers
    assert record["matrices"].keys() == config["svd_ranks"].keys()
    for path, matrix in record["matrices"].items():
        assert matrix["rank"] == config["svd_ranks"][path]
        assert matrix["shape"] == list(LINEARS[path.split(".", 2)[2]])
        assert matrix.get("shared_with") == config["svd_shared"].get(path)
    card = (out / "README.md").read_text()
    assert f"--share-layers {layers}" in card
    assert "stored and counted once" in card.replace("\n", " ")
    assert not failed(verify(out, str(dense)))
    assert not (out / ".svdconvert").exists()


def test_shared_by_one_is_not_shared(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "one", rank=16, device="cpu", share_layers=1)
    convert(dense, tmp_path / "default", rank=16, device="cpu")
    assert tree(tmp_path / "one") == tree(tmp_path / "default")
    assert read_config(tmp_path / "one")["svd_shared"] == {}


def test_plain_conversion_is_the_svd_of_the_stack(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=20, share_layers=3, dtype="float32", device="cpu")
    found, weights = products(tmp_path / "out"), read_weights(dense)
    for name in LINEARS:
        names = [f"gpt_neox.layers.{n}.{name}.weight" for n in range(3)]
        stack = torch.cat([weights[key] for key in names]).double()
        u, s, v = torch.linalg.svd(stack, full_matrices=False)
        best = (u[:, :20] * s[:20]) @ v[:20]
        assert float((torch.cat([found[key] for key in names]) - best).norm() / stack.norm()) < 2e-5


def test_more_rank_than_one_matrix_has(dense: Path, tmp_path: Path) -> None:
    """Three 64 x 256 matrices are one of 192 x 256; at rank 100 it is smaller and no layer could have that rank."""
    report = convert(dense, tmp_path / "out", rank=100, targets=["mlp.dense_4h_to_h"], share_layers=3, device="cpu")
    assert set(report.plan.ranks.values()) == {100}
    assert not failed(verify(tmp_path / "out", str(dense)))


def pooled_kfac(found: dict[str, Any], name: str) -> tuple[Tensors, Tensors, torch.Tensor]:
    lefts, rights = ([found[f"layers.{n}.{name}"][side] for n in range(3)] for side in (1, 0))
    return lefts, rights, sum(rights) / 3


def test_whiten_is_basis_sharing_with_refitted_coefficients(
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    """Against arXiv:2410.03765: Cholesky root of the summed Gram matrix, full SVD of the stack, and its inverse."""
    convert(
        dense, tmp_path / "out", rank=16, method="whiten", calibration=calibration, share_layers=3, dtype="float32",
        device="cpu",
    )  # fmt: skip
    found, weights, statistics = products(tmp_path / "out"), read_weights(dense), gradients(dense, calibration)
    for name in LINEARS:
        _, rights, pooled = pooled_kfac(statistics, name)
        stack = torch.cat([weights[f"gpt_neox.layers.{n}.{name}.weight"] for n in range(3)]).double()
        s = torch.linalg.cholesky(pooled + 1e-12 * pooled.diagonal().mean() * torch.eye(len(pooled)).double())
        u, values, v = torch.linalg.svd(stack @ s, full_matrices=False)
        basis = v[:16] @ torch.linalg.inv(s)
        theirs = ((u[:, :16] * values[:16]) @ basis).split(len(stack) // 3)
        for n, right in enumerate(rights):
            weight = weights[f"gpt_neox.layers.{n}.{name}.weight"].double()
            refitted = weight @ right @ basis.T @ torch.linalg.inv(basis @ right @ basis.T) @ basis

            def loss(product: torch.Tensor, weight: torch.Tensor = weight, right: torch.Tensor = right) -> float:
                return float(((weight - product) @ right * (weight - product)).sum())

            ours = loss(found[f"gpt_neox.layers.{n}.{name}.weight"])
            assert ours == pytest.approx(loss(refitted), rel=1e-3), name
            assert ours <= loss(theirs[n]) * 1.001


def test_predicted_loss_is_that_of_the_layers_own_metrics(
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    report = convert(
        dense, tmp_path / "out", rank=16, method="kfac", calibration=calibration, share_layers=3, dtype="float32",
        device="cpu",
    )  # fmt: skip
    found, weights, total = products(tmp_path / "out"), read_weights(dense), 0.0
    for name, (inputs, outputs, _) in gradients(dense, calibration).items():
        error = weights[f"gpt_neox.{name}.weight"].double() - found[f"gpt_neox.{name}.weight"]
        left, right = (0.8 * gram + 0.2 * gram.diagonal().diag() for gram in (outputs, inputs))
        lost = float((left @ error @ right * error).sum())
        assert report.matrices[name]["lost"] == pytest.approx(lost, rel=2e-3), name
        assert report.matrices[name]["predicted_loss"] == pytest.approx(lost / 2, rel=2e-3), name
        weight = weights[f"gpt_neox.{name}.weight"].double()
        outputs_lost = float((error @ inputs * error).sum() / (weight @ inputs * weight).sum())
        assert report.matrices[name]["output_error"] == pytest.approx(outputs_lost**0.5, rel=2e-3), name
        total += lost
    assert report.outcome.record["predicted_loss"] == pytest.approx(total / 2, rel=2e-3)


@pytest.mark.parametrize("method", ["svd", "kfac"])
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_global_budget_is_spent(
    keep: float,
    method: str,
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    text = None if method == "svd" else calibration
    settings = {"keep": keep, "method": method, "calibration": text, "share_layers": 2, "check": False}
    report = convert(dense, tmp_path / "out", allocation="global", **settings)
    whole = 3 * sum(rows * columns for rows, columns in LINEARS.values())
    spent = sum(target.params for target in report.plan.targets)
    stored = sum(
        t.numel() for n, t in read_weights(tmp_path / "out").items() if n.endswith(("down.weight", "up.weight"))
    )
    kept_dense = sum(target.dense_params for target in report.plan.targets if target.rank is None)
    assert spent == stored + kept_dense
    following = min(
        min(t.layout.cost(t.rank + 1, t.shape), t.dense_params) - t.params
        for t in report.plan.targets
        if t.rank is not None
    )
    assert keep * whole - following < spent <= keep * whole
    if method == "kfac":
        uniform = convert(dense, tmp_path / "uniform", allocation="uniform", **settings)
        assert report.outcome.record["predicted_loss"] <= uniform.outcome.record["predicted_loss"]
    again = convert(dense, tmp_path / "out", allocation="global", **settings)
    assert again.outcome.already_done
    assert again.plan.ranks == report.plan.ranks == read_config(tmp_path / "out")["svd_ranks"]


@pytest.mark.parametrize(
    ("method", "name", "after"),
    [
        ("whiten", "outer_statistic", 5),
        ("kfac", "outer_statistic", 3),
        ("kfac", "decompose_shared", 0),
        ("kfac", "decompose_shared", 2),
        ("kfac", "decompose", 3),
    ],
)
def test_interrupted_and_continued(
    method: str,
    name: str,
    after: int,
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"keep": 0.5, "method": method, "calibration": calibration, "share_layers": 2, "check": False}
    convert(dense, tmp_path / "undisturbed", **settings)
    real, calls = getattr(decomposer, name), []

    def breaks(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(decomposer, name, breaks)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    calls.clear()
    calls.extend([1] * 1000)
    convert(dense, tmp_path / "out", **settings)
    # per kind of matrix one group of two, whose layers are learnt, and one layer by itself
    assert len(calls) - 1000 == {"outer_statistic": 8, "decompose_shared": 4, "decompose": 4}[name] - after
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_one_work_folder_serves_all_groupings(
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"keep": 0.5, "method": "whiten", "calibration": calibration, "check": False}
    for layers in (1, 2, 3):
        convert(dense, tmp_path / f"kept-{layers}", share_layers=layers, work=tmp_path / "work", **settings)
        convert(dense, tmp_path / f"fresh-{layers}", share_layers=layers, **settings)
        assert tree(tmp_path / f"kept-{layers}") == tree(tmp_path / f"fresh-{layers}")
    assert not list((tmp_path / "work" / "decompositions").glob("*.outer"))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was computed again")

    for name in ("decompose", "decompose_shared", "outer_statistic"):
        monkeypatch.setattr(decomposer, name, fail)
    convert(dense, tmp_path / "again", share_layers=2, work=tmp_path / "work", **settings)
    assert tree(tmp_path / "again") == tree(tmp_path / "kept-2")


@pytest.mark.parametrize(("shards", "pickled"), [(2, False), (7, False), (3, True)])
def test_layers_of_a_group_in_different_files(
    shards: int, pickled: bool, dense: Path, fresh: Callable[..., Path], tmp_path: Path
) -> None:
    source = fresh(shards=shards, pickled=pickled)
    convert(source, tmp_path / "out", rank=16, share_layers=3, device="cpu", max_shard_size="40kB", workers=2)
    convert(dense, tmp_path / "one", rank=16, share_layers=3, device="cpu")
    found, expected = (read_weights(tmp_path / name) for name in ("out", "one"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_from_a_hub_that_keeps_each_layer_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: Path
) -> None:
    """No file of a group can be given up before the last one has come."""
    from support.hub_server import HubServer, use_hub

    source = write_checkpoint(tmp_path / "source", shards=6)
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        server.add("owner/tiny", source)
        report = convert("owner/tiny", tmp_path / "out", rank=16, share_layers=3, device="cpu")
    convert(dense, tmp_path / "one", rank=16, share_layers=3, device="cpu")
    found, expected = (read_weights(tmp_path / name) for name in ("out", "one"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert report.outcome.checks


def test_command_line(dense: Path, run: Run, tmp_path: Path) -> None:
    planned = run("plan", dense, "--keep", 0.5, "--share-layers", 2, "--json")
    assert planned.code == 0, planned.err
    made = json.loads(planned.out)
    assert len(made["svd_shared"]) == 4
    assert made["settings"]["share_layers"] == 2
    assert {entry["shared"] for entry in made["groups"]} == {2}
    assert {entry["count"] for entry in made["groups"]} == {3}
    done = run(dense, "--keep", 0.5, "--share-layers", 2, "--out", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    assert "input-side factors shared by 2 layers" in done.out
    assert "groups of fewer than 2 layers: 1 from layer 2 on" in done.out
    weights = read_weights(tmp_path / "out")
    assert sum(tensor.numel() for tensor in weights.values()) == made["params"]["after"]
    assert read_config(tmp_path / "out")["svd_ranks"] == made["svd_ranks"]
    checked = run("verify", tmp_path / "out", "--against", dense)
    assert checked.code == 0, checked.out
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(read_config(tmp_path / "out") | {"svd_shared": {}}))
    lost = run("verify", tmp_path / "out")
    assert lost.code == 1
    assert "layers.1.attention.query_key_value.down.weight is missing" in re.sub(r"\s+", " ", lost.out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--share-layers", 0], "--share-layers 0 is too small; the least is 1"),
        (["--share-layers", -2], "--share-layers -2 is too small"),
        (["--share-layers", 2, "--layout", "pivoted"], "does not go with --layout pivoted"),
        (["--share-layers", 2, "--refit", "sequential"], "--refit sequential does not go with --share-layers"),
        (
            ["--share-layers", 2, "--rank", "layers.0.*=8"],
            "but not layers.1.attention.query_key_value, and the two share",
        ),
        (["--share-layers", 3, "--rank", "mlp.dense_4h_to_h=193"], "192 x 256 matrix including the layers that share"),
    ],
)
def test_refusals(options: list[object], words: str, dense: Path, run: Run, tmp_path: Path) -> None:
    ranks = [] if "--rank" in options else ["--rank", 8]
    result = run("convert", dense, *ranks, *options, "--out", tmp_path / "out", "--device", "cpu")
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_another_grouping_is_another_job(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu", check=False, share_layers=2)
    with pytest.raises(InputError, match=r"another share layers \(2, now 3\)"):
        convert(dense, tmp_path / "out", rank=16, device="cpu", share_layers=3)


def test_all_layers_of_a_group_or_none(dense: Path) -> None:
    made = plan(dense, rank={"*": 8, "attention.dense": 12}, share_layers=3)
    assert {made.ranks[path] for path in TARGETS if path.endswith("attention.dense")} == {12}
    gap = plan(dense, rank=8, targets=["layers.0.*", "layers.2.*"], share_layers=2)
    assert not gap.shared
    assert any("groups of fewer than 2 layers: 1 from layer 0 on, 1 from layer 2 on" in note for note in gap.notes)


def test_damaged_sharing_is_named(dense: Path, tmp_path: Path) -> None:
    from svdconvert import densify

    convert(dense, tmp_path / "out", rank=16, device="cpu", share_layers=2, targets=["attention.dense"])
    config = read_config(tmp_path / "out")
    broken = config | {"svd_shared": {"layers.1.attention.dense": "layers.7.attention.dense"}}
    (tmp_path / "out" / "config.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"layers\.7\.attention\.dense"):
        densify(tmp_path / "out", tmp_path / "dense", device="cpu")
    assert failed(verify(tmp_path / "out"))
