"""Fused projections in parts, with statistics of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_config, read_weights
from support.split_models import SPLIT, load, outputs, ranks, stock
from torch import Tensor, nn

from svdconvert import Calibration, calibrate, convert, spectrum, verify
from svdconvert.calibration.collector import part_statistics
from svdconvert.calibration.run import StatisticsRun
from svdconvert.commands.verify import failed
from svdconvert.families.fused import fused_layer
from svdconvert.families.row import Architecture
from svdconvert.methods.statistics import ModuleStatistics, Needs
from svdconvert.methods.table import METHODS, shrink
from svdconvert.names import suffix
from svdconvert.storage.source import LocalSource


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def test_statistics_of_parts(row: Architecture, dense: Path, text: Path, tmp_path: Path) -> None:
    """Collected for themselves or taken from those of the whole; the Fisher vectors add up to the whole's."""
    source = LocalSource(dense)
    tokens = Calibration(str(text), samples=6, length=24).tokens(source)
    parts = [module for module in ranks(dense) if fused_layer(row, module)]
    wholes = list(dict.fromkeys(str(fused_layer(row, module)) for module in parts))
    needs = Needs(input_gram=True, output_gram=True, input_abs=True, fisher=True)

    def collected(modules: list[str]) -> dict[str, ModuleStatistics]:
        run = StatisticsRun(source, tokens, needs, modules, work=tmp_path)
        return {name: entry for _, block in run for name, entry in block.items()}

    own, whole, places = collected(parts), collected(wholes), outputs(read_config(dense))
    fisher = dict.fromkeys(wholes, torch.zeros(()))
    for module, entry in own.items():
        layer, _, part = module.rpartition(".")
        all_of_it, rows = whole[layer], places[part]
        assert entry.fisher is not None
        assert all_of_it.output_gram is not None
        fisher[layer] = fisher[layer] + entry.fisher
        block = all_of_it.output_gram[rows][:, rows]
        taken = part_statistics(replace(all_of_it, fisher=None), row.fused[suffix(layer)].sections(source.config)[part])
        for found in (entry, taken):
            for one, other in ((found.output_gram, block), (found.input_gram, all_of_it.input_gram)):
                assert one is not None  # to the rounding of float32 products
                assert other is not None
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))
            torch.testing.assert_close(found.input_abs, all_of_it.input_abs, rtol=1e-12, atol=0)
    for layer, total in fisher.items():
        torch.testing.assert_close(total, whole[layer].fisher, rtol=1e-5, atol=0)


@pytest.mark.parametrize("collected", [False, True], ids=["text", "folder"])
def test_metrics_of_parts_are_blocks_of_the_whole(
    row: Architecture, dense: Path, text: Path, collected: bool, tmp_path: Path
) -> None:
    """Singular values of each part in the metric of its own outputs, against L^1/2 W R^1/2 in float64."""
    calibration = Calibration(str(text), samples=12, length=32)
    options: dict[str, Any] = {"calibration": calibration}
    if collected:
        calibrate(dense, calibration, tmp_path / "stats", device="cpu")
        options = {"stats": tmp_path / "stats"}
    found = spectrum(dense, method="kfac", split_fused=True, device="cpu", **options)
    assert len(found.matrices) == 3 * (len(row.targets) + 2)
    source = LocalSource(dense)
    (name,) = row.fused
    layers = [f"{'h' if row.model_type == 'gpt2' else 'layers'}.{index}.{name}" for index in range(3)]
    run = StatisticsRun(source, calibration.tokens(source), Needs(True, True), layers, work=tmp_path)
    entries = {layer: entry for _, part in run for layer, entry in part.items()}
    tensors, places = read_weights(dense), outputs(read_config(dense))
    compared = 0
    for matrix in found.matrices:
        layer, _, part = matrix.module.rpartition(".")
        if layer not in entries:
            continue
        rows, entry = places[part], entries[layer]
        assert entry.input_gram is not None
        assert entry.output_gram is not None
        weight = tensors[f"{row.prefix}{layer}.weight"].double()
        weight = (weight.T if row.transposed else weight)[rows]
        left = shrink(entry.output_gram[rows][:, rows], 0.2)
        values = torch.linalg.svdvals(root(left) @ weight @ root(shrink(entry.input_gram, 0.2))).square()
        assert matrix.shape == tuple(weight.shape)
        error = (torch.from_numpy(matrix.energies) - values).abs().max() / values.max()
        assert float(error) < 1e-6
        compared += 1
    assert compared == 9


@pytest.mark.parametrize("row", ["gpt2"], indirect=True)
def test_every_method(row: Architecture, dense: Path, text: Path, tmp_path: Path) -> None:
    """Fisher information of the parts' own outputs among them."""
    for method, rules in METHODS.items():
        out = tmp_path / method
        calibration = Calibration(str(text), samples=4, length=24) if rules.statistics else None
        convert(dense, out, keep=0.5, method=method, calibration=calibration, split_fused=True, check=False)
        assert not failed(verify(out, str(dense)))


@pytest.mark.parametrize(
    ("row", "layout"),
    [(name, "balanced" if name == "phi3" else "pivoted") for name in SPLIT],
    indirect=["row"],
)
def test_calibrated_conversion(row: Architecture, dense: Path, text: Path, layout: str, tmp_path: Path) -> None:
    """One budget over all parts; what is told of the loss is what the written model loses, refitted or not."""
    calibration = Calibration(str(text), samples=16, length=32)
    source = LocalSource(dense)
    tokens = calibration.tokens(source)

    def loss(model: Any) -> float:
        with torch.no_grad():
            found = model(input_ids=tokens.ids).logits[:, :-1]
        return float(nn.functional.cross_entropy(found.flatten(0, 1), tokens.ids[:, 1:].flatten()))

    before = loss(stock(dense))
    options: dict[str, Any] = {"keep": 0.6, "layout": layout, "split_fused": True, "calibration": calibration}
    for refit in ("none", "sequential"):
        out = tmp_path / refit
        report = convert(dense, out, refit=refit, device="cpu", **options)
        record = report.outcome.record
        assert record["dense_loss"] == pytest.approx(before, rel=1e-5)
        assert record["measured_loss"] == pytest.approx(loss(load(out)) - before, rel=1e-3, abs=1e-5)
        planned = report.plan
        budget = int(0.6 * sum(target.dense_params for target in planned.targets))
        spent = sum(target.params for target in planned.targets)
        # what is left over does not buy another rank
        assert budget - max(sum(target.shape) for target in planned.targets) < spent <= budget
        assert not failed(verify(out, str(dense)))
        assert report.plan.settings["split_fused"]
        assert "--split-fused" in (out / "README.md").read_text()
    assert "refit" in record
