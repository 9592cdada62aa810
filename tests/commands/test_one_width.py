"""Ranks of a budget of parameters, all stored in one width: the ranks are those of the same budget without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import read_config, tree
from support.families import write_family
from support.html_pages import parse
from support.launching import together
from support.packed import as_floats, pack_folder
from support.refusals import assert_refused
from support.rounded_results import loss, stored

from svdconvert import (
    Calibration,
    InputError,
    JobError,
    calibrate,
    convert,
    densify,
    evaluate,
    heal,
    plan,
    verify,
)
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.commands.verify import failed
from svdconvert.factoring import operations
from svdconvert.grids import Grid
from svdconvert.jobs.record import read_record
from svdconvert.models.loading import load_model
from svdconvert.reports.result_page import result_page

BITS = (8, 4)
KEEP = 0.7
# All matrices but those of the last layer's feed-forward part.
TARGETS = ("layers.0.*", "layers.1.*", "layers.2.attention.*")
OTHERS = ("layers.2.mlp.dense_h_to_4h", "layers.2.mlp.dense_4h_to_h")


@pytest.fixture(scope="module")
def given(dense: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all conversions of this file have in common."""
    place = tmp_path_factory.mktemp("given")
    calibrate(dense, calibration, place / "stats", device="cpu")
    return {"stats": place / "stats", "work": place / "work", "device": "cpu", "targets": TARGETS}


@pytest.fixture(scope="module")
def results(dense: Path, given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bits -> result of a budget of parameters; 16 for what is stored in the model's own type. Read only."""
    folder = tmp_path_factory.mktemp("results")
    for bits in BITS:
        convert(dense, folder / str(bits), keep=KEEP, widths=[bits], **given, report=True)
    convert(dense, folder / "16", keep=KEEP, **given)
    return {bits: folder / str(bits) for bits in (*BITS, 16)}


def told(result: Path) -> dict[str, dict[str, Any]]:
    """Module path -> what the record says of a matrix."""
    record = read_record(result).results
    return {**record["matrices"], **record.get("rounded", {})}


def ranks(result: Path) -> dict[str, int]:
    return {module: matrix["rank"] for module, matrix in read_record(result).results["matrices"].items()}


def grids_of(result: Path) -> dict[str, Grid]:
    """Name of a weight of few bits -> its grid."""
    return {
        f"gpt_neox.{module}{side}.weight": Grid(bits, group)
        for module, one in told(result).items()
        for side, bits, group in zip(
            (".down", ".up") if "rank" in one else ("",), one["bits"], one["groups"], strict=True
        )
    }


def divergence(dense: Path, result: Path, stats: Path) -> float:
    """Mean KL(dense || result) on the calibration text, by the models as they run, float64."""
    ids = StatisticsFolder(stats).tokens().ids
    with torch.no_grad():
        wanted, found = (load_model(one, "cpu", torch.float64)(ids).logits.log_softmax(-1) for one in (dense, result))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("bits", BITS)
def test_ranks_are_those_of_the_budget_and_every_target_has_the_width(bits: int, results: dict[int, Path]) -> None:
    record = read_record(results[bits]).results
    assert ranks(results[bits]) == ranks(results[16])
    assert set(record["rounded"]) == set(read_record(results[16]).results["dense_targets"])
    assert {width for matrix in told(results[bits]).values() for width in matrix["bits"]} == {bits}
    assert record["dense_targets"] == {}
    assert read_record(results[bits]).settings["widths"] == [bits]
    assert record["params"] == read_record(results[16]).results["params"]
    groups = read_config(results[bits])["quantization_config"]["config_groups"].values()
    assert {one["weights"]["num_bits"] for one in groups} == {bits}


@pytest.mark.parametrize("bits", BITS)
def test_what_is_no_target_stays_as_it_is(bits: int, results: dict[int, Path], dense: Path) -> None:
    before, after = load_file(dense / "model.safetensors"), load_file(results[bits] / "model.safetensors")
    for module in OTHERS:
        assert torch.equal(after[f"gpt_neox.{module}.weight"], before[f"gpt_neox.{module}.weight"])


@pytest.mark.parametrize("bits", BITS)
def test_the_loss_that_is_told_is_that_of_the_weights_as_they_are_stored(
    bits: int, results: dict[int, Path], dense: Path, given: dict[str, Any]
) -> None:
    before, kept = load_file(dense / "model.safetensors"), StatisticsFolder(given["stats"])
    for module, matrix in told(results[bits]).items():
        weight = before[f"gpt_neox.{module}.weight"].double().numpy()
        error = weight - stored(results[bits], module)
        assert matrix["predicted_loss"] == pytest.approx(loss(error, kept.load([module])[module]), rel=1e-4), module
        relative = np.linalg.norm(error) / np.linalg.norm(weight)
        assert matrix["relative_error"] == pytest.approx(relative, rel=1e-4), module


@pytest.mark.parametrize(("how", "bits"), [({"keep": 0.5}, 8), ({"rank": 20}, 5), ({"rank": {"dense": 24}}, 4)])
def test_bytes_on_the_disk_are_those_of_the_plan(
    how: dict[str, Any], bits: int, dense: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    """With uniform ranks, that is; a plan does not know others."""
    made = plan(dense, **how, widths=[bits], targets=TARGETS)
    convert(dense, tmp_path / "out", **how, widths=str(bits), allocation="uniform", **given)
    assert made.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert {grid.bits for grid in made.grids.values()} == {bits}
    assert made.ranks == ranks(tmp_path / "out")
    assert not [target for target in made.targets if target.reason]


@pytest.mark.parametrize("bits", BITS)
def test_it_runs_as_the_matrices_that_are_stored(bits: int, results: dict[int, Path], dense: Path) -> None:
    ids = torch.arange(40)[None] % 150
    model = load_model(dense, "cpu", torch.float64)
    for module in told(results[bits]):
        model.gpt_neox.get_submodule(module).weight.data = torch.from_numpy(stored(results[bits], module))
    packed = load_model(results[bits], "cpu", torch.float64)
    with torch.no_grad():
        wanted, found = model(ids).logits, packed(ids).logits
    assert float((found - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


def test_eight_bits_cost_little_and_four_less_than_rounding_the_factors_to_the_nearest(
    results: dict[int, Path], dense: Path, given: dict[str, Any], tmp_path: Path
) -> None:
    grids = grids_of(results[4])
    assert any(grid.group for grid in grids.values())
    values = pack_folder(results[16], tmp_path / "packed", lambda name, shape: grids.get(name))
    nearest = divergence(dense, as_floats(tmp_path / "packed", values, tmp_path / "floats"), given["stats"])
    found = {bits: divergence(dense, result, given["stats"]) for bits, result in results.items()}
    assert found[8] < 1.02 * found[16]
    assert found[16] < found[4] < nearest
    assert found[4] - found[16] < 0.5 * (nearest - found[16])


def test_it_is_what_it_says_it_is_and_other_commands_take_it(
    results: dict[int, Path], dense: Path, text: Path, calibration: Calibration, tmp_path: Path
) -> None:
    assert not failed(verify(results[4], dense))
    densify(results[4], tmp_path / "dense", device="cpu")
    ours, theirs = (evaluate(folder, text, device="cpu") for folder in (results[4], tmp_path / "dense"))
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-3)
    assert ours.parameters == read_record(results[4]).results["params"]["after"]
    heal(results[4], dense, calibration, tmp_path / "healed", steps=2, lr=1e-3, device="cpu")
    before, after = (load_file(folder / "model.safetensors") for folder in (results[4], tmp_path / "healed"))
    assert all(torch.equal(after[name], before[name]) for name in before if not name.endswith("_scale"))


@pytest.mark.parametrize("bits", BITS)
def test_card_and_page_tell_it(bits: int, results: dict[int, Path]) -> None:
    card, page = (results[bits] / "README.md").read_text(), (results[bits] / "report.html").read_bytes()
    assert f"--keep {KEEP} --widths {bits}" in card
    assert f" at {bits} bits; {len(ranks(results[bits]))} as products of low rank" in card
    assert "an estimate for comparing ranks" in card  # nothing was measured token by token, as of bytes
    assert next(parse(page).all("h1")).text.endswith("factored and rounded")
    assert b"Bits per weight of the dense matrix" in page
    assert b"an estimate for comparing ranks" in page


@pytest.mark.parametrize("size", [{"keep": 0.5}, {"rank": 24}], ids=["measured", "uniform"])
def test_ranks_of_any_allocation_stay(size: dict[str, Any], dense: Path, given: dict[str, Any], tmp_path: Path) -> None:
    allocation = "measured" if "keep" in size else "uniform"
    for name, widths in (("rounded", {"widths": "6"}), ("plain", {})):
        convert(dense, tmp_path / name, **size, **widths, **given, allocation=allocation, check=False)
    assert ranks(tmp_path / "rounded") == ranks(tmp_path / "plain")
    assert {width for matrix in told(tmp_path / "rounded").values() for width in matrix["bits"]} == {6}
    if allocation == "measured":
        budgets = [read_record(tmp_path / name).results["budget"] for name in ("rounded", "plain")]
        assert budgets[0] == {**budgets[1], "rounded_to": 6}
        card = (tmp_path / "rounded" / "README.md").read_text()
        assert "Ranks chosen by measuring" in card
        assert "; all before rounding to 6 bits." in card
        page = result_page(read_record(tmp_path / "rounded"), tmp_path / "rounded")
        assert b"All of this is before rounding to 6 bits." in page


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "whiten"])
def test_methods_of_other_metrics_round_in_those_that_they_have(
    method: str, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Their loss, whatever it is in, grows less by it than by rounding the written factors to the nearest."""
    how: dict[str, Any] = {"rank": 24, "method": method, "targets": TARGETS[:1], "work": tmp_path / "work"}
    how |= {} if method == "svd" else {"calibration": calibration}
    convert(dense, tmp_path / "out", **how, widths="3", device="cpu")
    convert(dense, tmp_path / "plain", **how, device="cpu")
    assert not failed(verify(tmp_path / "out", dense))
    record = read_record(tmp_path / "out").results
    assert "predicted_loss" not in record
    assert ranks(tmp_path / "out") == ranks(tmp_path / "plain")
    grids, before = grids_of(tmp_path / "out"), load_file(dense / "model.safetensors")
    values = pack_folder(tmp_path / "plain", tmp_path / "packed", lambda name, shape: grids.get(name))
    for module, matrix in record["matrices"].items():
        weight = before[f"gpt_neox.{module}.weight"].double().numpy()
        down, up = (values[f"gpt_neox.{module}.{side}.weight"].double().numpy() for side in ("down", "up"))
        error, nearest = stored(tmp_path / "out", module) - weight, up @ down - weight
        if method == "svd":  # whose metrics are the identity
            assert matrix["lost"] == pytest.approx(np.linalg.norm(error) ** 2, rel=1e-4)
            assert np.linalg.norm(error) < 0.99 * np.linalg.norm(nearest), module


def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    results: dict[int, Path], dense: Path, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = operations.MeteredMatrix.rounded, [4]

    def broken(self: Any, rank: int | None, grids: Sequence[Any]) -> Any:
        if not left[0]:
            raise JobError("the power is off")
        left[0] -= 1
        return whole(self, rank, grids)

    how: dict[str, Any] = {"keep": KEEP, "widths": "4", **given, "report": True}
    with monkeypatch.context() as patched:
        patched.setattr(operations.MeteredMatrix, "rounded", broken)
        with pytest.raises(JobError, match="power is off"):
            convert(dense, tmp_path / "out", **how, workers=1)
    with pytest.raises(InputError, match="widths"):
        convert(dense, tmp_path / "out", **{**how, "widths": "5"})
    done = convert(dense, tmp_path / "out", **how, workers=2)
    assert done.outcome.resumed
    ours, theirs = (tree(folder, but="report.html") for folder in (tmp_path / "out", results[4]))  # it tells times
    assert ours == theirs
    again = convert(dense, tmp_path / "out", **how)
    assert again.outcome.already_done
    assert again.plan.bytes_after == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert again.plan.grids == done.plan.grids


def test_processes_change_nothing(
    results: dict[int, Path], dense: Path, given: dict[str, Any], launcher: Any, tmp_path: Path
) -> None:
    targets = [word for name in TARGETS for word in ("--targets", name)]
    line = (dense, "--keep", KEEP, "--widths", 4, "--stats", given["stats"], *targets, "--device", "cpu", "--no-check")
    done = together(launcher, 2, *line, "--work", given["work"], "--out", tmp_path / "out")
    assert [ended.status for ended in done] == [0, 0], done
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", results[4]))
    assert ours == theirs


def test_it_is_healed_at_the_end_of_a_conversion(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    how: dict[str, Any] = {"rank": 24, "targets": TARGETS[:1], "device": "cpu", "calibration": calibration}
    convert(dense, tmp_path / "out", **how, widths="4", heal=True)
    record = read_record(tmp_path / "out").results
    assert {width for one in record["training_free"]["matrices"].values() for width in one["bits"]} == {4}
    assert record["healing"]["after"]["kl"] <= record["healing"]["before"]["kl"]
    assert "quantization_config" in read_config(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0.5, "widths": "8,4"}, "widths=[8, 4] leaves a choice, which bytes makes; beside keep=0.5 give one"),
        ({"rank": 20, "widths": "16"}, "widths=[16] has no effect beside rank=20"),
        ({"keep": 0.5, "widths": "9"}, "cannot be stored in"),
        ({"max_kl": 0.1, "widths": "8"}, "widths=[8] does not go with max_kl=0.1"),
        ({"keep": 0.5, "widths": "8", "layout": "pivoted"}, "widths=[8] does not go with layout='pivoted'"),
        ({"keep": 0.5, "widths": "8", "share_layers": 2}, "widths=[8] does not go with share_layers=2"),
        ({"keep": 0.5, "widths": "8", "split_fused": True}, "widths=[8] does not go with split_fused=True"),
        ({"keep": 0.5, "widths": "8", "refit": "sequential"}, "widths=[8] does not go with refit='sequential'"),
        ({"keep": 0.5, "widths": "8", "solver": "fast"}, "solver='fast' is for plain SVD"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: dict[str, Any], words: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {} if "solver" in settings else {"calibration": Calibration(str(text))}
    with pytest.raises(InputError) as refused:
        convert(dense, tmp_path / "out", **settings, **given, device="cpu")
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_verbose_tells_of_products_and_of_what_is_only_rounded(
    run: Callable[..., SimpleNamespace], dense: Path, tmp_path: Path
) -> None:
    line = ("--rank", "attention.dense=20", "--widths", 8, "--method", "svd", "--device", "cpu", "--no-check", "-v")
    done = run(dense, *line, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    lines = re.findall(
        r"gpt_neox\.(layers\S+)\.weight, (rank 20|round), (energy kept 0\.\d{4}, )?relative error (0\.\d{4}), ",
        done.out,
    )
    every = told(tmp_path / "out")
    assert {name: float(error) for name, _, _, error in lines} == pytest.approx(
        {name: one["relative_error"] for name, one in every.items()}, abs=1e-4
    )
    assert {name for name, way, energy, _ in lines if way == "rank 20" and energy} == ranks(tmp_path / "out").keys()
    assert len(ranks(tmp_path / "out")) == 3 < len(every)


def test_what_the_command_line_refuses_is_in_its_words(
    run: Callable[..., SimpleNamespace], dense: Path, tmp_path: Path
) -> None:
    assert_refused(run("plan", dense, "--keep", 0.5, "--widths", "8,6"), "--widths 8,6 leaves a choice, which --bytes")
    gpt2 = write_family(tmp_path / "gpt2", "gpt2")
    assert_refused(run("plan", gpt2, "--keep", 0.5, "--widths", "8"), "--widths 8 cannot be met", "transposed")
