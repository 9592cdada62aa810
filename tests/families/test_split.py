"""Fused projections in parts: queries, keys and values that are one matrix in the source, as three."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights, tree
from support.families import FAMILIES, VERSION, VOCAB, rewrite_config, write_family
from support.launching import torchrun
from test_families import (  # noqa: F401 - these run here too, on the checkpoints of this file
    test_base_model,
    test_engine_that_replaces_every_linear_layer,
    test_generation,
    test_logits_by_block,
    test_round_trip,
    test_sequence_classification,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from svdconvert import Calibration, InputError, ablate, calibrate, convert, densify, fold, plan, spectrum, verify
from svdconvert.calibration.collector import part_statistics
from svdconvert.calibration.run import StatisticsRun
from svdconvert.commands.verify import failed
from svdconvert.families.fused import fused_layer, split_tensors
from svdconvert.families.row import Architecture, Section
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS
from svdconvert.methods.statistics import ModuleStatistics, Needs
from svdconvert.methods.table import METHODS, shrink
from svdconvert.names import suffix
from svdconvert.planning.targets import find_targets
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import Cut

SPLIT = [name for name in FAMILIES if ARCHITECTURES[name].fused]
PARTS = ("query", "key", "value")
IDS = torch.randint(4, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session", params=SPLIT)
def row(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def dense(row: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stock model, with grouped-query attention in the Phi-3. Read only."""
    return write_family(tmp_path_factory.mktemp(row.model_type) / "dense", row.model_type)


@pytest.fixture(scope="session")
def pairs(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """By layout: a checkpoint in parts, the keys dense in the second layer, and the same densified. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {}
    every = ranks(dense, 0.5)
    some = {module: rank for module, rank in every.items() if not module.endswith("key") or ".1." not in module}
    for layout in LAYOUTS:
        factored, product = folder / f"{layout}-factored", folder / f"{layout}-densified"
        convert(dense, factored, rank=some, layout=layout, split_fused=True, factor_all=True, device="cpu")
        densify(factored, product, device="cpu")
        made[layout] = SimpleNamespace(factored=factored, densified=product, ranks=some)
    return made


@pytest.fixture(scope="session", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, SimpleNamespace]) -> SimpleNamespace:
    return pairs[request.param]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"The {n}th story begins with {n * 7} words and ends well." for n in range(60)))
    return path


def ranks(folder: Path, share: float = 1.0) -> dict[str, int]:
    """A share of the full rank of every target, in parts."""
    targets = find_targets(LocalSource(folder), (), split_fused=True)
    return {target.module: max(int(share * min(target.shape)), 1) for target in targets}


def load(folder: Path, **options: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values())
    return model.eval()


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def outputs(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs of each part, from what the attention of the stock model does with them."""
    if config["model_type"] == "gpt_neox":  # view(..., heads, 3 * head size), then chunk(3)
        heads = config["num_attention_heads"]
        places = torch.arange(3 * config["hidden_size"]).view(heads, -1).chunk(3, dim=1)
    elif config["model_type"] == "phi3":
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        places = torch.arange((heads + 2 * groups) * size).split([heads * size, groups * size, groups * size])
    else:
        places = torch.arange(3 * config["n_embd"]).split(config["n_embd"])
    return {name: place.flatten() for name, place in zip(PARTS, places, strict=True)}


# -- sections and their bytes ------------------------------------------------------------------------------------------


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3), stretches=st.integers(1, 4), inputs=st.integers(1, 4), flip=st.booleans()
)
@settings(deadline=None, max_examples=50)
def test_sections_are_a_partition(sizes: tuple[int, int, int], stretches: int, inputs: int, flip: bool) -> None:
    """What is taken apart is put together again, along either dimension; and every output is in one section."""
    total = sum(sizes) * stretches
    starts = (0, sizes[0], sizes[0] + sizes[1])
    sections = [Section(start, size, stretches) for start, size in zip(starts, sizes, strict=True)]
    fused = torch.arange(float(total * inputs)).view(total, inputs)
    dim = 1 if flip else 0
    fused = fused.T if flip else fused
    parts = [section.of(fused, dim) for section in sections]
    assert [part.shape[dim] for part in parts] == [section.outputs for section in sections]
    again = torch.full_like(fused, -1)
    for section, part in zip(sections, parts, strict=True):
        section.put(part, again, dim)
    assert torch.equal(again, fused)


@given(
    count=st.integers(1, 6), start=st.integers(0, 5), length=st.integers(1, 6), gap=st.integers(0, 5), data=st.data()
)
@settings(deadline=None, max_examples=100)
def test_runs_of_a_cut(count: int, start: int, length: int, gap: int, data: st.DataObject) -> None:
    """Any piece of a part, read run by run, is that piece of what a loop over the stretches gives."""
    cut = Cut("w", start, length, start + length + gap)
    stored = bytes(range(256))[: count * cut.stride]
    part = b"".join(stored[i * cut.stride + start :][:length] for i in range(count))
    offset = data.draw(st.integers(0, len(part)))
    size = data.draw(st.integers(0, len(part) - offset))
    assert b"".join(stored[at : at + n] for at, n in cut.runs(offset, size)) == part[offset : offset + size]


def test_parts_are_what_the_stock_attention_takes(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """Weights and biases of the parts, read from safetensors and from a pickled checkpoint."""
    tensors = read_weights(dense)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((dense / "config.json").read_bytes())
    torch.save(tensors, pickled / "pytorch_model.bin")
    places = outputs(read_config(dense))
    for folder in (dense, pickled):
        source = LocalSource(folder)
        reader, compared = WeightReader(source), 0
        for name, info in split_tensors(source.tensors, row, source.config, lambda layer: True).items():
            if info.cut is None:
                continue
            part = name.rpartition(".")[0].rpartition(".")[2]
            whole = tensors[info.cut.tensor]
            expected = whole.index_select(whole.dim() - 1 if row.transposed else 0, places[part])
            assert info.shape == tuple(expected.shape)
            found = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
            assert torch.equal(found, expected)
            streamed = torch.cat([piece.clone() for piece in reader.stream(info)])
            assert torch.equal(streamed.view(found.dtype).view(found.shape), expected)
            compared += 1
        assert compared == 3 * 3 * (1 if row.model_type == "phi3" else 2)


# -- conversion --------------------------------------------------------------------------------------------------------


def test_full_rank_equals_the_stock_model(row: Architecture, dense: Path, tmp_path: Path) -> None:
    full = ranks(dense)
    report = convert(dense, tmp_path / "out", rank=full, factor_all=True, split_fused=True, device="cpu")
    assert max(report.errors) < 1e-5
    model = load(tmp_path / "out")
    assert model.config.svd_ranks == full
    assert sum(fused_layer(row, module) is not None for module in full) == 9
    assert distance(logits(model), logits(stock(dense))) < 1e-4


def test_densified_equals_factored(row: Architecture, dense: Path, pair: SimpleNamespace) -> None:
    found, info = AutoModelForCausalLM.from_pretrained(pair.densified, output_loading_info=True)
    assert not any(info.values())
    expected = logits(found.eval())
    model = load(pair.factored)
    assert distance(logits(model), expected) < 1e-4
    assert distance(logits(stock(dense)), expected) > 0.05
    shapes = {name: tensor.shape for name, tensor in read_weights(dense).items()}
    products = read_weights(pair.densified)
    assert {name: tensor.shape for name, tensor in products.items()} == shapes
    assert not failed(verify(pair.factored, str(dense)))
    # the part that stayed dense is there to the bit
    (layer,) = {fused_layer(row, module) for module in pair.ranks if ".1." in module} - {None}
    name, axis = f"{row.prefix}{layer}.weight", 1 if row.transposed else 0
    keys = outputs(read_config(dense))["key"]
    kept = (tensors[name].index_select(axis, keys) for tensors in (products, read_weights(dense)))
    assert torch.equal(*kept)
    linear = dict(model.base_model.named_modules())[f"{layer}.key"]
    assert not hasattr(linear, "rank")


def test_sharded_sources(row: Architecture, dense: Path, pairs: Any, tmp_path: Path) -> None:
    """Shards that cut through layers, and names without the base model's prefix, give the same tensors."""
    shards = write_family(tmp_path / "shards", row.model_type, max_shard_size="60KB")
    bare = tmp_path / "bare"
    bare.mkdir()
    stored = {name.removeprefix(row.prefix): tensor.clone() for name, tensor in read_weights(dense).items()}
    save_file(stored, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_bytes((dense / "config.json").read_bytes())
    expected = read_weights(pairs["balanced"].factored)
    options: dict[str, Any] = {"split_fused": True, "factor_all": True, "device": "cpu", "overwrite": True}
    for folder in (shards, bare):
        convert(folder, tmp_path / "out", rank=pairs["balanced"].ranks, check=False, **options)
        found = read_weights(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_from_the_hub(row: Architecture, pairs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a stored tensor begins in its file is known when the file is here."""
    from support.hub_server import HubServer, use_hub

    shards = write_family(tmp_path / "shards", row.model_type, max_shard_size="60KB")
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        server.add("owner/tiny", shards)
        options: dict[str, Any] = {"split_fused": True, "factor_all": True, "device": "cpu", "check": False}
        convert("owner/tiny", tmp_path / "out", rank=pairs["balanced"].ranks, **options)
    found, expected = read_weights(tmp_path / "out"), read_weights(pairs["balanced"].factored)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_several_processes(tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", "gpt_neox")
    line = [dense, "--rank", 16, "--split-fused", "--device", "cpu", "--no-check", "--out", tmp_path / "many"]
    done = torchrun(2, "-m", "svdconvert", *line)
    assert done.code == 0, done.err
    convert(dense, tmp_path / "one", rank=16, split_fused=True, device="cpu", check=False)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_budgets_are_exact(row: Architecture, dense: Path, layout: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep": 0.6, "layout": layout, "split_fused": True}
    planned = plan(dense, **options)
    convert(dense, tmp_path / "out", device="cpu", **options)
    tensors = read_weights(tmp_path / "out")
    floats = sum(tensor.numel() for name, tensor in tensors.items() if tensor.is_floating_point())
    assert floats == planned.params_after
    targets = planned.targets
    assert sum(target.params for target in targets) <= 0.6 * sum(target.dense_params for target in targets)
    fused, parts = plan(dense, keep=0.6).targets, [target for target in targets if target.fused]
    assert sum(target.dense_params for target in fused) == sum(target.dense_params for target in targets)
    assert len(parts) == 9
    assert all(target.rank is not None for target in parts)


def test_plan_needs_the_config_only(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    one, two = (plan(folder, keep=0.5, split_fused=True) for folder in (dense, tmp_path))
    assert (one.params_before, one.params_after, one.ranks) == (two.params_before, two.params_after, two.ranks)
    assert one.params_before == plan(dense, keep=0.5).params_before


def test_patterns_name_parts_and_what_they_are_parts_of(row: Architecture, dense: Path) -> None:
    (name,) = row.fused
    short = name.rpartition(".")[2]
    made = plan(dense, rank={short: 9, f"{short}.value": 7}, split_fused=True)
    assert {(suffix(module), rank) for module, rank in made.ranks.items()} == {
        (f"{name}.query", 9),
        (f"{name}.key", 9),
        (f"{name}.value", 7),
    }
    chosen = plan(dense, rank=8, targets=[f"{name}.key"], split_fused=True)
    assert {suffix(module) for module in chosen.ranks} == {f"{name}.key"}
    every = plan(dense, rank=8, targets=[name], split_fused=True)
    assert len(every.ranks) == 9


def test_what_has_no_factored_part_stays_whole(row: Architecture, dense: Path, tmp_path: Path) -> None:
    first = next(iter(ranks(dense)))
    convert(dense, tmp_path / "out", rank={first: 8}, split_fused=True, device="cpu")
    found, source = read_weights(tmp_path / "out"), read_weights(dense)
    (layer,) = {fused_layer(row, first)}
    gone = {name for name in source if name.startswith(f"{row.prefix}{layer}.")}
    assert source.keys() - found.keys() - {row.head[0]} == gone
    assert not failed(verify(tmp_path / "out", str(dense)))
    load(tmp_path / "out")


def test_refusals(dense: Path, tmp_path: Path, text: Path) -> None:
    calibration = Calibration(str(text), samples=2, length=16)
    calibrate(dense, calibration, tmp_path / "stats", methods=["fwsvd"], device="cpu")
    options: dict[str, Any] = {"keep": 0.6, "method": "fwsvd", "stats": tmp_path / "stats", "device": "cpu"}
    with pytest.raises(InputError, match="fwsvd with --split-fused needs the text itself"):
        convert(dense, tmp_path / "out", split_fused=True, **options)
    with pytest.raises(InputError, match="matches no target"):
        plan(dense, rank={"gate": 3}, split_fused=True)
    assert not (tmp_path / "out").exists()


def test_nothing_to_split(tmp_path: Path, run: Any) -> None:
    folder = write_family(tmp_path / "dense", "llama")
    done = run("plan", folder, "--rank", 8, "--split-fused")
    assert done.code == 2
    assert "--split-fused has nothing to split" in done.err


@pytest.mark.parametrize("change", ["absent", "unnamed", "unknown", "both"])
def test_unsound_checkpoints_do_not_load(pairs: Any, row: Architecture, change: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(pairs["balanced"].factored, tmp_path / "torn"))
    found = read_config(folder)["svd_ranks"]
    first = next(module for module in found if fused_layer(row, module))
    if change == "absent":
        missing = next(fused_layer(row, module) for module in found if fused_layer(row, module) and ".1." in module)
        found[f"{missing}.key"] = 4
    elif change == "unnamed":
        del found[first]
    elif change == "unknown":
        found[f"{fused_layer(row, first)}.other"] = found.pop(first)
    else:
        found[str(fused_layer(row, first))] = 4
    rewrite_config(folder, svd_ranks=found)
    with pytest.raises((ValueError, RuntimeError), match="svd_ranks"):
        load(folder)


def test_densify_of_a_torn_checkpoint(row: Architecture, pairs: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(pairs["balanced"].factored, tmp_path / "torn"))
    tensors = read_weights(folder)
    gone = next(name for name in tensors if name.endswith(".key.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks .*key\.weight"):
        densify(folder, tmp_path / "out", device="cpu")


# -- statistics --------------------------------------------------------------------------------------------------------


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
            torch.testing.assert_close(found.output_gram, block, rtol=1e-12, atol=0)
            torch.testing.assert_close(found.input_gram, all_of_it.input_gram, rtol=1e-12, atol=0)
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


def test_every_method(row: Architecture, dense: Path, text: Path, tmp_path: Path) -> None:
    """Fisher information of the parts' own outputs among them."""
    for method, rules in METHODS.items():
        out = tmp_path / method
        calibration = Calibration(str(text), samples=4, length=24) if rules.statistics else None
        convert(dense, out, keep=0.5, method=method, calibration=calibration, split_fused=True, check=False)
        assert not failed(verify(out, str(dense)))


@pytest.mark.parametrize("layout", LAYOUTS)
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


# -- together with other options ---------------------------------------------------------------------------------------


def test_layers_that_share(row: Architecture, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", keep=0.6, share_layers=2, split_fused=True, device="cpu")
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    model = load(tmp_path / "out")
    assert len(model.config.svd_shared) == len(row.targets) + 2
    assert distance(logits(model), logits(stock(tmp_path / "densified"))) < 1e-4
    assert not failed(verify(tmp_path / "out", str(dense)))


def test_adapters_of_parts(row: Architecture, pair: SimpleNamespace, tmp_path: Path) -> None:
    """LoRA on factored parts and on the dense one, by the names that the card gives, and folded into them."""
    from peft import LoraConfig, get_peft_model

    card = (pair.factored / "README.md").read_text()
    names = ast.literal_eval(card.partition("target_modules = ")[2].partition("\n")[0])
    assert set(PARTS) < set(names)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(load(pair.factored), config).eval()
    generator = torch.Generator().manual_seed(1)
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(wrapped) == 3 * (len(row.targets) + 2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fold(pair.factored, tmp_path / "adapter", tmp_path / "folded", device="cpu")
    assert distance(expected, logits(load(pair.factored))) > 0.01
    assert distance(logits(load(tmp_path / "folded")), expected) < 1e-4
    densify(tmp_path / "folded", tmp_path / "densified", device="cpu")
    assert distance(logits(stock(tmp_path / "densified")), expected) < 1e-4


@pytest.mark.skipif(VERSION < (4, 57), reason="no bitsandbytes with CPU kernels for this transformers")
def test_four_bit_loading(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """Factored parts at ranks of 64, and one that stays dense."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    wanted = {module: rank for module, rank in ranks(dense).items() if rank == 64 and not module.endswith("key")}
    convert(dense, tmp_path, rank=wanted, factor_all=True, split_fused=True, device="cpu", check=False)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load(tmp_path, quantization_config=quantised, device_map="cpu", dtype=torch.float32)
    kinds = {name.removeprefix(row.prefix): type(module).__name__ for name, module in model.named_modules()}
    parts = [module for module in wanted if fused_layer(row, module)]
    assert parts
    for path in parts:
        assert kinds[f"{path}.down"] == kinds[f"{path}.up"] == "Linear4bit"
        assert kinds[f"{fused_layer(row, path)}.key"] == "Linear4bit"
    expected = logits(stock(dense))
    error = float((logits(model) - expected).pow(2).mean().sqrt() / expected.std())
    assert 1e-4 < error < 0.8


def test_ablation_of_all_but_nothing(row: Architecture, dense: Path, text: Path, tmp_path: Path) -> None:
    """Without all singular values in one group the fused matrices are zeros, as they are when they are whole."""
    (name,) = row.fused
    options: dict[str, Any] = {"groups": 1, "targets": [name], "window": 16, "device": "cpu"}
    _, parts = ablate(dense, text, split_fused=True, **options)
    _, whole = ablate(dense, text, **options)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_tensor_parallel_plan(row: Architecture, pairs: Any) -> None:
    config = AutoConfig.from_pretrained(pairs["balanced"].factored, trust_remote_code=True)
    (name,) = row.fused
    block = f"{'h' if row.model_type == 'gpt2' else 'layers'}.*.{name.rpartition('.')[0]}"
    blocks = [block.replace("*", str(index)) for index in range(3)]
    config.svd_ranks = {}
    whole = {rule: style for rule, style in config.base_model_tp_plan.items() if rule.startswith(block)}
    if not whole:
        pytest.skip("no plan for this family in this version")
    last = name.rpartition(".")[2]
    config.svd_ranks = {f"{own}.{last}.{part}": 4 for own in blocks for part in PARTS if part != "value"}
    split = {rule: style for rule, style in config.base_model_tp_plan.items() if rule.startswith(block)}
    style = whole.pop(f"{block}.{last}")
    assert split == whole | {f"{block}.{last}.{part}{'' if part == 'value' else '.up'}": style for part in PARTS}
    del config.svd_ranks[f"{blocks[2]}.{last}.key"]
    assert not [rule for rule in config.base_model_tp_plan if rule.startswith(block)]
    config.svd_ranks = {f"{blocks[0]}.{last}.{part}": 4 for part in PARTS}
    assert not [rule for rule in config.base_model_tp_plan if rule.startswith(block)]


def test_from_the_command_line(tmp_path: Path) -> None:
    """Converted and verified in processes of their own."""
    dense = write_family(tmp_path / "dense", "gpt_neox")

    def call(*args: object) -> str:
        command = [sys.executable, "-m", "svdconvert", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    made = ("--keep", 0.6, "--split-fused", "--out", tmp_path / "out", "--device", "cpu")
    assert "query" in call(dense, *made)
    call("verify", tmp_path / "out", "--against", dense)


def test_sweep(text: Path, run: Any, tmp_path: Path) -> None:
    dense, row = write_family(tmp_path / "dense", "gpt_neox"), ARCHITECTURES["gpt_neox"]
    options = ("--text", text, "--keep", 0.6, "--window", 16, "--split-fused", "--no-plot", "--out", tmp_path / "out")
    done = run("sweep", dense, *options, "--keep-models")
    assert done.code == 0, done.err
    (config,) = (tmp_path / "out" / "models").glob("*/config.json")
    assert any(fused_layer(row, module) for module in read_config(config.parent)["svd_ranks"])
    done = run("sweep", dense, *(option for option in options if option != "--split-fused"))
    assert done.code == 2
    assert "split fused" in done.err
