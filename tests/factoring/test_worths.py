"""What the losses of price lists are multiplied with: errors made anew, and measured on the text by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from svdconvert import Calibration, calibrate, convert
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.factoring import operations
from svdconvert.factoring.sampled import Bench
from svdconvert.factoring.token_losses import TokenLosses
from svdconvert.factoring.worths import HIGHEST, LOWEST, bounded
from svdconvert.grids import Grid
from svdconvert.jobs.record import read_record
from svdconvert.linalg.feedback import Feedback
from svdconvert.linalg.integers import Rounded, unpack
from svdconvert.methods.table import shrink
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource


def test_worths_are_measured_losses_over_those_in_the_metrics(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats, work, out = tmp_path / "stats", tmp_path / "work", tmp_path / "out"
    calibrate(dense, calibration, stats, device="cpu")
    passes: list[dict[str, Any]] = []  # of dense matrices, then of products
    measure = TokenLosses.measure

    def listened(self: TokenLosses, modules: Any, errors: Any, key: Any) -> Any:
        passes.append(dict(key["ways"]))
        return measure(self, modules, errors, key)

    monkeypatch.setattr(TokenLosses, "measure", listened)
    monkeypatch.setattr(operations, "SWEEPS", 0)  # write what is priced
    convert(dense, out, bytes=0.2, stats=stats, work=work, device="cpu", targets="layers.1.*", check=False)
    monkeypatch.setattr(TokenLosses, "measure", measure)
    record, weights, kept = read_record(out).results, load_file(dense / "model.safetensors"), StatisticsFolder(stats)
    told = {**record["matrices"], **record["rounded"]}
    assert len(told) == 4
    last = {module: way for ways in passes[1:] for module, way in ways.items()}
    stored, errors, losses = load_file(out / "model.safetensors"), {}, {}
    for path in (work / "prices").glob("*/*.json"):
        module, ways = path.stem, json.loads(path.read_text())["choices"]
        weight = weights[f"gpt_neox.{module}.weight"].float()
        rank, grids = (last if module in record["matrices"] else passes[0])[module]
        if rank is None:
            three = [way["grids"] for way in ways if way["rank"] is None and [pair[0] for pair in way["grids"]] == [3]]
            assert grids == min(three)
            right = shrink(kept.load([module])[module].input_gram, 0.2)
            rounded = Feedback(right).round(weight, Grid(*grids[0]), torch.float16).values(torch.float64)
        elif (rank, [pair[0] for pair in grids]) == (told[module]["rank"], told[module]["bits"]):
            stem = f"gpt_neox.{module}"
            rounded = packed(stored, f"{stem}.up", grids[1][0]) @ packed(stored, f"{stem}.down", grids[0][0])
        else:  # another one than was taken in the end
            continue
        (losses[module],) = (way["loss"] for way in ways if (way["rank"], way["grids"]) == (rank, grids))
        errors[module] = rounded - weight.double()
    source = LocalSource(dense)
    bench = Bench(source, kept.tokens(), {}, tmp_path / "results", tmp_path / "states", "cpu", 4, Events())
    measured = TokenLosses(bench).measure(
        list(errors), lambda index: {suffix(m): e for m, e in errors.items() if layer_number(m) == index}, {}
    )
    for module in errors:
        # near ties may be rounded either way
        assert told[module]["worth"] == pytest.approx(measured[module] / losses[module], rel=0.03), module
    assert errors.keys() & record["matrices"].keys()
    assert errors.keys() & record["rounded"].keys()
    assert len({matrix["worth"] for matrix in told.values()}) == 4


def packed(tensors: Mapping[str, torch.Tensor], stem: str, bits: int) -> torch.Tensor:
    """A packed weight, [m, n] float64."""
    codes = unpack(tensors[f"{stem}.weight_packed"], bits, int(tensors[f"{stem}.weight_shape"][1]))
    return Rounded(codes, tensors[f"{stem}.weight_scale"]).values(torch.float64)


def test_a_worth_far_from_all_others_is_held_near_them() -> None:
    assert bounded([1e-9, 0.3, None, 0.5, 0.7, 1e9]) == [LOWEST * 0.5, 0.3, None, 0.5, 0.7, HIGHEST * 0.5]
    assert bounded([0.3, 0.5, 0.4]) == [0.3, 0.5, 0.4]
    assert bounded([None, None]) == [None, None]
