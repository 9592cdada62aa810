"""What the losses of price lists are multiplied with: errors made anew, and measured on the text by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdconvert import Calibration, calibrate, convert
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.factoring.sampled import Bench
from svdconvert.factoring.token_losses import TokenLosses
from svdconvert.factoring.worths import HIGHEST, LOWEST, bounded
from svdconvert.grids import Grid
from svdconvert.jobs.record import read_record
from svdconvert.linalg.feedback import Feedback
from svdconvert.methods.table import shrink
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource


def test_worths_are_measured_losses_over_those_in_the_metrics(
    dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    stats, work, out = tmp_path / "stats", tmp_path / "work", tmp_path / "out"
    calibrate(dense, calibration, stats, device="cpu")
    convert(dense, out, bytes=0.25, stats=stats, work=work, device="cpu", targets="layers.1.*", check=False)
    record, weights, kept = read_record(out).results, load_file(dense / "model.safetensors"), StatisticsFolder(stats)
    told = {**record["matrices"], **record["rounded"]}
    assert len(told) == 4
    errors, losses = {}, {}
    for path in (work / "prices").glob("*/*.json"):
        module, ways = path.stem, json.loads(path.read_text())["choices"]
        dense_ways = [way for way in ways if way["rank"] is None and way["grids"] and way["grids"][0][0] == 3]
        way = min(dense_ways, key=lambda way: way["grids"][0])
        weight = weights[f"gpt_neox.{module}.weight"].float()
        right = shrink(kept.load([module])[module].input_gram, 0.2)
        rounded = Feedback(right).round(weight, Grid(*way["grids"][0]), torch.float16)
        errors[module], losses[module] = rounded.values(torch.float64) - weight.double(), way["loss"]
    source = LocalSource(dense)
    bench = Bench(source, kept.tokens(), {}, tmp_path / "results", tmp_path / "states", "cpu", 4, Events())
    measured = TokenLosses(bench).measure(
        list(errors), lambda index: {suffix(m): e for m, e in errors.items() if layer_number(m) == index}, {}
    )
    for module, matrix in told.items():
        # near ties may be rounded either way
        assert matrix["worth"] == pytest.approx(measured[module] / losses[module], rel=0.03), module
    assert len({matrix["worth"] for matrix in told.values()}) == 4


def test_a_worth_far_from_all_others_is_held_near_them() -> None:
    assert bounded([1e-9, 0.3, None, 0.5, 0.7, 1e9]) == [LOWEST * 0.5, 0.3, 1.0, 0.5, 0.7, HIGHEST * 0.5]
    assert bounded([0.3, 0.5, 0.4]) == [0.3, 0.5, 0.4]
    assert bounded([None, None]) == [1.0, 1.0]
