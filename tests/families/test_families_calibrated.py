"""Every family, calibrated block by block: the statistics and losses of the whole model in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_config, read_weights
from support.families import FAMILIES, full_ranks, read_matrices
from support.naive_experts import chosen_tokens, with_naive_experts
from support.representatives import FEW, REPRESENTATIVES
from support.running import IDS, MASK, TOKENS, distance, load, logits
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
)

from svdconvert import Calibration, calibrate, convert, plan
from svdconvert.calibration.experts import PRIOR
from svdconvert.calibration.run import StatisticsRun
from svdconvert.factoring.measured import measure_losses
from svdconvert.families.row import Architecture
from svdconvert.methods.statistics import STATISTICS, Needs
from svdconvert.methods.table import METHODS
from svdconvert.names import kind as kind_of
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource


def keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    output.retain_grad()
    seen[name] = args[0], output
    return output.clone()  # OLMo and OLMoE clip it in place


def in_memory(row: Architecture, model: Any, paths: list[str]) -> tuple[dict[str, dict[str, Tensor]], float]:
    """All statistics by autograd through the whole model, one unpadded sequence at a time; and the loss."""
    sums: dict[str, dict[str, Tensor]] = {}
    seen_by: dict[str, int] = {}
    nll = 0.0
    for ids, counted in zip(IDS, MASK.sum(dim=1).tolist(), strict=True):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            model.base_model.get_submodule(path).register_forward_hook(partial(keep, seen, path)) for path in paths
        ]
        own = ids[None, :counted]
        found = model(input_ids=own, attention_mask=torch.ones_like(own)).logits[0, :-1]
        loss = nn.functional.cross_entropy(found, own[0, 1:], reduction="sum")
        loss.backward()
        nll += float(loss.detach())
        for hook in hooks:
            hook.remove()
        for path, (x, y) in seen.items():
            weight = model.base_model.get_submodule(path).weight
            assert y.grad is not None
            x, g = x.detach().flatten(0, -2), y.grad.flatten(0, -2)
            if (chosen := chosen_tokens(model, path)) is not None:
                x = x[chosen]
            seen_by[path] = seen_by.get(path, 0) + len(x)
            here = {
                "input_gram": x.T @ x,
                "output_gram": g.T @ g,
                "input_abs": x.abs().sum(0),
                "fisher": weight.grad.square().sum(1 if row.transposed else 0),
            }
            into = sums.setdefault(path, {})
            for kind, value in here.items():
                into[kind] = into.get(kind, 0) + value
        model.zero_grad()
    counts = dict.fromkeys(STATISTICS, TOKENS.tokens) | {"fisher": 3}
    means = {path: {kind: value / counts[kind] for kind, value in into.items()} for path, into in sums.items()}
    for path in sums:
        if ".experts." in path:
            alike = [
                other for other in sums if kind_of(other) == kind_of(path) and layer_number(other) == layer_number(path)
            ]
            means[path] |= pulled(path, sums, seen_by, alike, inner=path.endswith(row.experts.names[-1]))
    return means, nll


def pulled(
    path: str, sums: dict[str, dict[str, Tensor]], seen_by: dict[str, int], alike: list[str], *, inner: bool
) -> dict[str, Tensor]:
    """Moments of an expert's layer, pulled towards those of all experts, or towards their energy in inner channels."""
    found, tokens = {}, seen_by[path]
    for kind, side_is_inner in (("input_gram", inner), ("input_abs", inner), ("output_gram", not inner)):
        common = sum(sums[other][kind] for other in alike) / sum(seen_by[other] for other in alike)
        if side_is_inner:
            energy = common.trace() / len(common) if common.dim() == 2 else common.mean()
            common = energy * (torch.eye(len(common)) if common.dim() == 2 else torch.ones(len(common)))
        prior = PRIOR * len(common)
        mean = (sums[path][kind] + prior * common) / (tokens + prior)
        found[kind] = mean if kind == "output_gram" else mean * max(tokens, 1) / TOKENS.tokens
    return found


def test_streamed_statistics_equal_those_in_memory(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """Masks, positions, windows, soft caps, scaled embeddings: all that a block is called with must be right."""
    model = with_naive_experts(AutoModelForCausalLM.from_pretrained(dense).eval(), row)
    paths = list(full_ranks(row, dense))
    expected, nll = in_memory(row, model, paths)
    for batch_size in (1, 3) if row.model_type in REPRESENTATIVES else (3,):
        run = StatisticsRun(
            LocalSource(dense),
            TOKENS,
            Needs(True, True, True, True),
            paths,
            work=tmp_path,
            batch_size=batch_size,
        )
        found = {path: entry for _, part in run for path, entry in part.items()}
        assert run.loss is not None
        assert run.loss.nll == pytest.approx(nll, rel=1e-5)
        for path, entry in expected.items():
            for kind, value in entry.items():
                error = float((getattr(found[path], kind) - value).norm() / value.norm())
                assert error < 1e-4, (path, kind, error)


@FEW
def test_streamed_losses_with_and_without_replaced_weights(
    row: Architecture, checkpoints: Any, dense: Path, tmp_path: Path
) -> None:
    """Blocks of the dense model with the products in the place of their matrices are the densified model."""
    pair = checkpoints.pair(row.model_type)  # of either layout they are dense matrices here
    products = read_matrices(pair.densified)
    factored = read_config(pair.factored)["svd_ranks"]

    def weights(index: int) -> dict[str, Tensor]:
        found = {}
        for module in factored:
            if layer_number(module) == index:
                product = products[f"{row.prefix}{module}.weight"]
                found[suffix(module)] = product.T if row.transposed else product
        return found

    losses = measure_losses(
        LocalSource(dense), TOKENS, weights, work=tmp_path / "w", device="cpu", batch_size=3, events=Events()
    )
    for folder, loss in zip((dense, pair.densified), losses, strict=True):
        model, expected = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0
        for ids, counted in zip(IDS, MASK.sum(dim=1).tolist(), strict=True):
            found = logits(model, ids[None, :counted])[0, :-1]
            expected += float(nn.functional.cross_entropy(found, ids[1:counted], reduction="sum"))
        assert loss.nll == pytest.approx(expected, rel=1e-5)


# Stored the other way round; with norms behind layers; experts with an MLP each; stacked ones beside a recurrence.
@pytest.mark.parametrize(
    "row", [name for name in ("gpt2", "gemma2", "mixtral", "qwen3_next") if name in FAMILIES], indirect=True
)
def test_every_method_reaches_a_size(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """From one calibration, whatever the size is asked for as."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th story begins with {n * 7} words and ends well." for n in range(40)))
    calibrate(
        dense, Calibration(str(text), samples=8, length=32), tmp_path / "stats", methods=list(METHODS), device="cpu"
    )
    size = plan(dense, keep=0.6).params_after
    found = []
    for method, rules in METHODS.items():
        stats = tmp_path / "stats" if rules.statistics else None
        report = convert(dense, tmp_path / method, params=size, method=method, stats=stats, device="cpu", check=False)
        tensors = read_weights(tmp_path / method)
        assert sum(tensor.numel() for tensor in tensors.values()) == report.plan.params_after <= size
        # what is left over does not buy one more rank everywhere
        assert size - report.plan.params_after < sum(sum(target.shape) for target in report.plan.targets)
        found.append(logits(load(tmp_path / method)))
    assert all(distance(one, other) > 0.01 for n, one in enumerate(found) for other in found[:n])


@pytest.mark.parametrize("row", ["gpt2", "gemma2", "mixtral"], indirect=True)
def test_calibrated_conversion_from_the_command_line(row: Architecture, dense: Path, run: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th story begins with {n * 7} words and ends well." for n in range(40)))
    options = (
        "--layout",
        "pivoted",
        "--calib",
        text,
        "--calib-samples",
        8,
        "--calib-length",
        32,
        "--refit",
        "sequential",
    )
    done = run(dense, "--keep", 0.6, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    done = run("verify", tmp_path / "out", "--against", dense)
    assert done.code == 0, done.out + done.err
    done = run("evaluate", tmp_path / "out", "--text", text, "--window", 32)
    assert done.code == 0, done.err
    done = run("ablate", dense, "--text", text, "--groups", 2, "--window", 32)
    assert done.code == 0, done.err
