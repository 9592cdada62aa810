"""A budget of bytes that is spent by measuring: the way nearest to the dense model is taken, and all are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import tree

from svdconvert import Calibration, InputError, JobError, calibrate, convert
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.commands import measured_bytes
from svdconvert.factoring.samples import held_out_sample
from svdconvert.factoring.trials import Trials
from svdconvert.jobs.record import read_record
from svdconvert.models.loading import load_model

TARGETS = ("layers.0.*", "layers.1.attention.*")


@pytest.fixture(scope="module")
def stats(dense: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes") / "stats"
    calibrate(dense, calibration, folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def request_of(stats: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("bytes") / "work"
    return {"stats": stats, "work": work, "device": "cpu", "targets": TARGETS, "bytes": 0.15}


@pytest.fixture(scope="module")
def result(dense: Path, request_of: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bytes") / "out"
    convert(dense, out, **request_of, allocation="measured")
    return out


def divergence(dense: Path, result: Path, tokens: Any) -> float:
    """Mean KL(dense || result) on held-out sequences, by the models as transformers runs them, float64."""
    sample = held_out_sample(tokens)
    ids, mask = tokens.ids[sample], tokens.mask[sample]
    with torch.no_grad():
        wanted, found = (
            load_model(folder, "cpu", torch.float64)(ids, attention_mask=mask.long()).logits.log_softmax(-1)
            for folder in (dense, result)
        )
    every = (wanted.exp() * (wanted - found)).sum(-1)[:, :-1]
    return float(every[mask[:, 1:]].mean())


def test_what_is_told_of_the_result_is_what_it_loses(dense: Path, result: Path, stats: Path) -> None:
    budget = read_record(result).results["budget"]
    assert budget["kl"] == pytest.approx(divergence(dense, result, StatisticsFolder(stats).tokens()), rel=2e-3)


def test_the_least_of_several_ways_is_taken_even_rounding_among_them(result: Path) -> None:
    budget = read_record(result).results["budget"]
    tried = {one["name"]: one["kl"] for one in budget["tried"]}
    assert len(tried) >= 3
    assert "products as priced" in tried
    assert any(name.startswith("all in ") for name in tried)
    assert budget["kl"] == min(tried.values())
    assert len(set(tried.values())) == len(tried)
    card = (result / "README.md").read_text()
    for name, kl in tried.items():
        assert f"{name} {kl:.4f}" in card


def test_even_rounding_is_what_its_name_says(
    dense: Path, request_of: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = measured_bytes.ways_to_spend
    last = lambda offers: dict([list(every(offers).items())[-1]])  # noqa: E731
    monkeypatch.setattr(measured_bytes, "ways_to_spend", last)
    convert(dense, tmp_path / "out", **request_of, allocation="measured", check=False)
    record = read_record(tmp_path / "out").results
    (tried,) = record["budget"]["tried"]
    assert tried["name"] == "all in 2 bits"
    assert not record["matrices"]
    assert {one["bits"][0] for one in record["rounded"].values()} == {2}
    assert len(record["rounded"]) == 6
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Ranks and bits chosen by measuring: KL {tried['kl']:.4f}" in card
    assert f"all in 2 bits {tried['kl']:.4f}" in card


def test_a_search_that_was_broken_off_goes_on_to_the_same_bytes(
    dense: Path,
    result: Path,
    request_of: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured, broken = list[str](), [True]
    measure = Trials._measured

    def counted(self: Trials, targets: Any, steps: Any, name: str) -> Any:
        if broken[0] and len(measured) == 2:
            raise JobError("the disk is full")
        measured.append(name)
        return measure(self, targets, steps, name)

    given = {**request_of, "work": tmp_path / "work"}
    monkeypatch.setattr(Trials, "_measured", counted)
    with pytest.raises(JobError, match="disk is full"):
        convert(dense, tmp_path / "out", **given, allocation="measured")
    tried = [one["name"] for one in read_record(result).results["budget"]["tried"]]
    assert measured == tried[:2]
    measured.clear()
    broken[0] = False
    convert(dense, tmp_path / "out", **given, allocation="measured")
    assert measured == tried[2:]
    assert tree(tmp_path / "out") == tree(result)


def test_the_command_tells_what_was_taken(
    run: Callable[..., SimpleNamespace], dense: Path, stats: Path, request_of: dict[str, Any], tmp_path: Path
) -> None:
    chosen = [word for name in TARGETS for word in ("--targets", name)]
    given = ("--stats", stats, "--work", request_of["work"], "--out", tmp_path / "out", "--device", "cpu", *chosen)
    done = run(dense, "--bytes", "0.15", "--allocation", "measured", *given)
    assert done.code == 0, done.err
    tried = json.loads((tmp_path / "out" / "svdconvert.json").read_text())["budget"]["tried"]
    best = min(tried, key=lambda one: one["kl"])
    said = " ".join((done.out + done.err).split())
    assert f"{best['name']}: KL {best['kl']:.4f}" in said
    assert "budget measured" in said


def test_one_sequence_is_too_few_to_measure_on(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    one = replace(calibration, samples=1)
    with pytest.raises(InputError, match="at least 2 calibration sequences"):
        convert(dense, tmp_path / "out", bytes=0.2, calibration=one, allocation="measured", device="cpu")
