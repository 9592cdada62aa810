"""A budget that is corrected by measurement: never worse on held-out text, and the same again, interrupted or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import tree
from support.refusals import assert_refused

from svdconvert import Calibration, JobError, calibrate, convert
from svdconvert.commands import measured_budgets
from svdconvert.models.stream import Stream
from svdconvert.planning.correction import Edge
from svdconvert.planning.size_search import STEPS

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_polyglot"


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_budgets, "ROUNDS", 2)


def test_it_helps_a_trained_model(tmp_path: Path) -> None:
    text = Calibration(str(EXAMPLE / "calibration.txt"), samples=24, length=32)
    settings = {"keep": 0.4, "layout": "pivoted", "calibration": text, "device": "cpu", "check": False}
    report = convert(EXAMPLE / "model", tmp_path / "out", allocation="measured", **settings)
    plain = convert(EXAMPLE / "model", tmp_path / "global", allocation="global", **settings)
    budget = report.outcome.record["budget"]
    first, *others = budget["rounds"]
    assert len(others) == 2
    assert budget["kl"] == min(one["kl"] for one in budget["rounds"]) < first["kl"]
    # the same budget, spent otherwise
    assert report.plan.ranks != plain.plan.ranks
    assert report.plan.params_after == pytest.approx(plain.plan.params_after, rel=2e-3)
    assert "share" not in budget


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.3, "layout": "pivoted", "dtype": "bfloat16", "refit": "sequential"},
        {"rank": 20, "share_layers": 2, "rank_multiple": 4},
        {"params": 120_000, "split_fused": True, "method": "svd"},
    ],
    ids=["refit", "shared", "svd in parts"],
)
def test_never_worse_than_global_and_the_same_again(
    settings: dict[str, Any], dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    common = {"allocation": "measured", "calibration": calibration, "device": "cpu", **settings}
    report = convert(dense, tmp_path / "out", **common, work=tmp_path / "work")
    budget = report.outcome.record["budget"]
    assert budget["kl"] == min(one["kl"] for one in budget["rounds"])
    assert report.outcome.record["settings"]["allocation"] == "measured"
    again = convert(dense, tmp_path / "again", **common, work=tmp_path / "other")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert again.outcome.record["budget"] == budget
    if "rank_multiple" in settings:
        assert all(rank % 4 == 0 for rank in report.plan.ranks.values())


def test_global_is_kept_where_corrections_do_harm(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdconvert.factoring.edges import Edges

    def misled(self: Edges, targets: Any, steps: Any, number: int) -> dict[str, Edge]:
        return {t.module: Edge((1.0, 1.0), 1e-3 if "attention" in t.module else 1e3) for t in targets}

    monkeypatch.setattr(Edges, "measure", misled)
    settings = {"keep": 0.3, "calibration": calibration, "device": "cpu", "check": False}
    report = convert(dense, tmp_path / "out", allocation="measured", **settings)
    convert(dense, tmp_path / "global", allocation="global", **settings)
    first, *others = report.outcome.record["budget"]["rounds"]
    assert all(one["kl"] > first["kl"] for one in others)
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "global")["model.safetensors"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_broken_round_goes_on(
    where: str, dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"keep": 0.3, "allocation": "measured", "calibration": calibration, "device": "cpu", "check": False}
    convert(dense, tmp_path / "whole", **settings)
    name, at = {"forward": ("run", 30), "backward": ("differentiate", 10)}[where]
    original, calls = getattr(Stream, name), []

    def dying(self: Stream, *args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == at:
            raise JobError("the disk is full")
        return original(self, *args)

    monkeypatch.setattr(Stream, name, dying)
    with pytest.raises(JobError, match="disk is full"):
        convert(dense, tmp_path / "out", **settings)
    kept = list((tmp_path / "out" / ".svdconvert" / "work" / "trials").iterdir())
    assert len(kept) == 1
    convert(dense, tmp_path / "out", **settings)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_limit_with_corrected_prices(calibration: Calibration, dense: Path, tmp_path: Path) -> None:
    settings = {"max_kl": 0.02, "calibration": calibration, "device": "cpu", "check": False}
    plain = convert(dense, tmp_path / "global", **settings).outcome.record["budget"]
    budget = convert(dense, tmp_path / "out", allocation="measured", **settings).outcome.record["budget"]
    assert budget["kl"] <= 0.02
    assert budget["share"] <= plain["share"]
    assert budget["sizes"][: len(plain["sizes"])] == plain["sizes"]
    if budget["share"] < plain["share"]:
        assert any(
            size["share"] == pytest.approx(budget["share"] - 1 / STEPS) and size["kl"] > 0.02
            for size in budget["sizes"][len(plain["sizes"]) :]
        )


def test_collected_statistics_suffice(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    calibrate(dense, calibration, tmp_path / "stats", methods=["kfac"], device="cpu")
    report = convert(
        dense, tmp_path / "out", keep=0.3, allocation="measured", stats=tmp_path / "stats", device="cpu", check=False
    )
    assert len(report.outcome.record["budget"]["rounds"]) == 3


def test_on_the_command_line(dense: Path, text: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]) -> None:
    words = ["--keep", 0.4, "--allocation", "measured", "--calib", text, "--calib-length", 32, "--device", "cpu"]
    said = run(dense, *words, "--calib-samples", 16, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    rounds = ", ".join(f"{one['kl']:.4f}" for one in record["budget"]["rounds"])
    assert f"KL of the global budget and its corrections: {rounds}" in said.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert rounds in card
    assert "--allocation measured" in card
    few = run(dense, *words, "--calib-samples", 2, "--out", tmp_path / "few")
    assert_refused(few, "--allocation measured needs at least 3 calibration sequences")
    assert_refused(run(dense, *words[:4], "--out", tmp_path / "none"), "--allocation measured needs a text")
    named = run(dense, "--rank", "dense=8", *words[2:], "--out", tmp_path / "named")
    assert_refused(named, "--allocation measured chooses the ranks itself")
