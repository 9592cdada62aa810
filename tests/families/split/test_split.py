"""Fused projections in parts: queries, keys and values that are one matrix in the source, as three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights, tree
from support.families import rewrite_config, write_family
from support.family_contract import LikeStock
from support.forked import Forked
from support.launching import together
from support.pairs import Pair
from support.split_models import distance, load, logits, outputs, ranks, stock
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, InputError, calibrate, convert, densify, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.families.fused import fused_layer, split_tensors
from svdconvert.families.row import Architecture, Section
from svdconvert.layouts.table import LAYOUTS
from svdconvert.names import suffix
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import Cut


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3), stretches=st.integers(1, 4), inputs=st.integers(1, 4), flip=st.booleans()
)
@settings(max_examples=50)
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
@settings(max_examples=100)
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
        compared = 0
        with WeightReader(source) as reader:
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


def test_densified_equals_factored(row: Architecture, dense: Path, pair: Pair) -> None:
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


def test_several_processes(launcher: Forked, tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", "gpt_neox")
    line = [dense, "--rank", 16, "--split-fused", "--device", "cpu", "--no-check", "--out", tmp_path / "many"]
    done = together(launcher, 2, *line)
    assert [ended.status for ended in done] == [0, 0], done
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
    with pytest.raises(InputError, match="method='fwsvd' with split_fused needs the text itself"):
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


class TestInParts(LikeStock):
    """On checkpoints in parts."""
