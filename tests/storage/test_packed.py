"""Weights stored as packed integers: what config.json says of them, and how they are read."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights
from support.packed import mixed, pack_folder

from svdconvert import convert
from svdconvert.errors import InputError
from svdconvert.factoring.measured import StoredMatrices
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.grids import Grid
from svdconvert.layouts.table import LAYOUTS, layout_of, stored_names
from svdconvert.storage.name_patterns import NamePattern, exactly
from svdconvert.storage.packed_config import is_packable, packed_grids, quantization_config
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import TensorInfo

WIDTHS = [Grid(bits, group) for bits in (2, 3, 4, 6, 8) for group in (0, 32)]


def weights(row: Architecture, layers: int = 4) -> tuple[list[str], list[str]]:
    """Weights of a family's factored model: those of its linear layers and their parts, and the others'."""
    targets = dict.fromkeys((*row.targets, *row.split().targets))
    modules = [f"{row.prefix}{row.pieces.blocks}.{i}.{target}" for i in range(layers) for target in targets]
    inner = [f"{module}{part}.weight" for module in modules for part in ("", ".down", ".up")]
    found = [name for name in inner if is_packable(name, row)]
    others = [f"{row.prefix}{name}.weight" for name in row.pieces.embeddings] + [row.head[1]]
    return found, [*others, *(name for name in inner if name not in found)]


def infos(names: list[str]) -> list[TensorInfo]:
    return [TensorInfo(name, "BF16", (128, 128)) for name in names]


def schemes(config: Mapping[str, Any], module: str) -> list[Mapping[str, Any]]:
    """What the groups say of a module, as compressed-tensors matches it."""

    def named(targets: list[str]) -> bool:
        return any(
            re.match(target.removeprefix("re:"), module) if target.startswith("re:") else target == module
            for target in targets
        )

    found = [group["weights"] for group in config["config_groups"].values() if named(group["targets"])]
    return found + [{}] * named(config["ignore"])


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_config_says_every_grid(row: Architecture, share: float) -> None:
    names, others = weights(row)
    generator = random.Random(0)
    chosen = {
        name: generator.choice(WIDTHS) if share else Grid(4, 32)
        for name in names
        if not share or generator.random() < share
    }
    plain = [name for name in names if name not in chosen]
    config = quantization_config(chosen, infos([*plain, *others]), row)
    assert packed_grids({"quantization_config": json.loads(json.dumps(config))}, list(chosen), "it") == chosen
    for name in (*names, *others):
        module, expected = name.removesuffix(".weight"), chosen[name].scheme() if name in chosen else {}
        # in the causal model, and in the base model by itself
        assert schemes(config, module) == [expected]
        assert schemes(config, module.removeprefix(row.prefix)) == [expected]
    assert "lm_head" in config["ignore"]
    if share == 0:
        kinds = {re.sub(r"\.\d+\.", ".", name) for name in names}
        assert len(config["config_groups"]["group_0"]["targets"]) == len(kinds)


@pytest.fixture(scope="module")
def folder(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Pivoted factors at several widths; the tensors that they stand for. Read only."""
    place = tmp_path_factory.mktemp("packed")
    convert(
        dense,
        place / "plain",
        rank=16,
        layout="pivoted",
        targets=["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        device="cpu",
    )
    values = pack_folder(place / "plain", place / "packed", mixed)
    return place / "packed", values


def test_read_as_matrices(folder: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdconvert.storage.packed_data.PIECE", 1000)
    path, values = folder
    source = LocalSource(path)
    assert {str(packed.grid) for packed in source.packed.values()} == {
        "3 bits",
        "4 bits in groups of 8",
        "5 bits in groups of 8",
        "6 bits",
        "8 bits in groups of 8",
        "8 bits in groups of 16",
    }
    assert source.tensors.keys() == values.keys()
    with WeightReader(source) as reader:
        for name, info in source.tensors.items():
            found = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
            assert torch.equal(found, values[name].to(found.dtype))
            if name in source.packed:
                assert (found.dtype, source.kept_type(info)) == (torch.float32, "F16")
                part = info.rows(3, 7)
                rows = reader.read(part, torch.empty(part.nbytes, dtype=torch.uint8))
                assert torch.equal(rows, values[name][3:7])
            else:
                assert source.kept_type(info) == info.dtype
    raw = LocalSource(path, as_stored=True)
    assert raw.tensors.keys() == read_weights(path).keys()
    assert raw.identity() == source.identity()


def test_products_of_a_conversion(folder: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, values = folder
    config = read_config(path)
    layout = layout_of(config)
    factors = {module: stored_names(config, "gpt_neox.", module) for module in config["svd_ranks"]}
    dense = "layers.0.attention.dense"
    matrices = StoredMatrices(
        [path / "model.safetensors"], factors, layout, config, {dense: f"gpt_neox.{dense}.weight"}
    )
    found = matrices(0)
    assert set(found) == {"attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
    assert torch.equal(found["attention.dense"], values[f"gpt_neox.{dense}.weight"].double())
    for name in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        expected = layout.product([values[part] for part in factors[f"layers.0.{name}"]])
        assert torch.equal(found[name], expected)


def change(folder: Path, out: Path, **changes: Callable[[Any], Any]) -> Path:
    """A copy with other settings, or tensors (``tensors=``)."""
    shutil.copytree(folder, out)
    config, tensors = read_config(out), read_weights(out)
    for name, made in changes.items():
        if name == "tensors":
            tensors = made(tensors)
        else:
            config["quantization_config"][name] = made(config["quantization_config"][name])
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


STEM = "gpt_neox.layers.1.mlp.dense_h_to_4h.down.weight_"


def in_group(**changes: Any) -> Callable[[Any], Any]:
    """Other settings of the first group's weights."""
    return lambda groups: {
        **groups,
        "group_0": {**groups["group_0"], "weights": groups["group_0"]["weights"] | changes},
    }


def with_tensor(suffix: str, made: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Any], Any]:
    def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        other = made(tensors.pop(STEM + suffix))
        return tensors if other is None else tensors | {STEM + suffix: other}

    return changed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": lambda _: "float-quantized"}, 'quantised with the format "float-quantized"'),
        ({"config_groups": in_group(symmetric=False)}, "quantised with symmetric false"),
        ({"config_groups": in_group(num_bits=12)}, "a width of 12 bits"),
        ({"config_groups": in_group(strategy="tensor")}, 'the strategy "tensor"'),
        ({"config_groups": in_group(num_bits="4")}, "is damaged"),
        ({"config_groups": lambda groups: {}}, "whose weight is packed, no widths"),
        ({"config_groups": lambda g: {**g, "x": {**g["group_0"], "targets": ["re:.*down$"]}}}, "packed, 2 widths"),
        ({"config_groups": lambda g: {**g, "x": {**g["group_0"], "targets": ["re:(?=a)b"]}}}, "the target"),
        ({"ignore": lambda _: ["re:.*mlp"]}, "a width, and that it has none"),
        ({"tensors": with_tensor("scale", lambda _: None)}, f"lacks {STEM}scale"),
        ({"tensors": with_tensor("shape", lambda t: t + 1)}, "do not make a matrix of shape [17, 65] at 6 bits"),
        ({"tensors": with_tensor("shape", lambda t: -t)}, "do not make a matrix"),
        ({"tensors": with_tensor("scale", lambda t: t.int())}, "are not of the types of packed weights"),
        # 5 integers of 6 bits a word
        ({"tensors": with_tensor("packed", lambda t: torch.zeros(16, 13, dtype=torch.int32))}, "before 0.18"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_what_is_refused(
    folder: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        LocalSource(change(folder[0], tmp_path / "it", **changes))


def test_packed_without_settings(folder: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path = change(folder[0], tmp_path / "it")
    config = read_config(path)
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no quantization_config"):
        LocalSource(path)


@given(st.text(r"ab.\d(|)*+?$^", max_size=9), st.text("ab.1", max_size=6))
def test_patterns_match_as_those_of_python(pattern: str, name: str) -> None:
    try:
        found = NamePattern(pattern).matches(name)
    except ValueError:
        return  # more than the pattern of a name
    try:
        expected = re.match(pattern, name)
    except re.error:
        return  # Python has more rules: no `**`
    assert found == (expected is not None)


@pytest.mark.parametrize("pattern", ["((a*)*)*b", "(a|a)" * 100 + "b", "(a|aa)*" * 20 + "b", ".*" * 50 + "b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.process_time()
    assert not NamePattern(pattern).matches("a" * 200)
    assert time.process_time() - start < 5


def test_a_name_is_no_pattern() -> None:
    assert exactly("a.b").matches("a.b")
    assert not exactly("a.b").matches("axb")
    assert not exactly("a.b").matches("a.bc")


def test_layouts_have_no_more_suffixes() -> None:
    """What ends in one of these is a factor to :func:`is_packable`."""
    for layout in LAYOUTS.values():
        assert set(layout.weights(1, (2, 2))) == {"down.weight", "up.weight"}
