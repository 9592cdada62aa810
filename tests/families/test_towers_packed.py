"""Models that see whose language model is packed, and what is made of such results: healed, folded, multiplied out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import read_config, read_weights
from support.running import distance
from support.towers import SEEN, both, load, stock, write

from svdconvert import Calibration, convert, densify, fold, heal, options, verify
from svdconvert.errors import InputError
from svdconvert.families.tower import Tower
from svdconvert.healing.trained import trained_names
from svdconvert.storage.packed_config import quantization_config
from svdconvert.storage.source import LocalSource

# With names in files of their own, and as in memory; with one class for the language model, and with one of its own.
NAMED = ("gemma3", "qwen3_vl")
named = pytest.mark.parametrize(
    "tower", [tower for tower in SEEN if tower.model_type in NAMED], ids=lambda tower: tower.stock
)
MAKE = Callable[[Tower], SimpleNamespace]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MAKE:
    """A tiny model that sees, and a result of rank and bits in a number of bytes, each once. Read only."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the cat sat on the mat and ate a fish\n" * 60, encoding="utf-8")
    calibration = Calibration(text, samples=8, length=32)
    known: dict[str, SimpleNamespace] = {}

    def make(tower: Tower) -> SimpleNamespace:
        if tower.svd_model_type not in known:
            folder = tmp_path_factory.mktemp(tower.svd_model_type)
            model = write(folder / "dense", tower)
            layers = [w for name, w in model.model.language_model.named_parameters() if name.endswith("_proj.weight")]
            whole = (folder / "dense" / "model.safetensors").stat().st_size
            size = whole - int(3.68 * sum(weight.numel() for weight in layers)) + 20_000
            convert(folder / "dense", folder / "packed", bytes=size, calibration=calibration, device="cpu")
            known[tower.svd_model_type] = SimpleNamespace(
                folder=folder, dense=folder / "dense", packed=folder / "packed", size=size, calibration=calibration
            )
        return known[tower.svd_model_type]

    return make


def opened(folder: Path) -> LocalSource:
    return LocalSource(folder)


@named
def test_packed(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """The language model alone, within the bytes; compressed-tensors loads it as what it stands for."""
    own = made(tower)
    config, source = read_config(own.packed), opened(own.packed)
    assert source.whole is not None
    assert 0.9 * own.size < (own.packed / "model.safetensors").stat().st_size <= own.size
    assert config["text_config"]["svd_ranks"]
    assert "quantization_config" not in config["text_config"]
    assert {name.startswith(tower.text.prefix) for name in source.packed} == {True}
    before, after = read_weights(own.dense), load_file(own.packed / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in source.whole.rest)
    assert all(check.passed for check in verify(own.packed, against=own.dense))
    densify(own.packed, tmp_path / "dense", device="cpu")
    assert "quantization_config" not in read_config(tmp_path / "dense")
    pytest.importorskip("compressed_tensors")
    model = load(own.packed)
    for ours, theirs in zip(both(model), both(load(tmp_path / "dense")), strict=True):
        assert distance(ours, theirs) < 1e-5
    scheme = {name for name, part in model.named_modules() if getattr(part, "quantization_scheme", None) is not None}
    assert scheme == {source.whole.in_memory(name).removesuffix(".weight") for name in source.packed}
    model.save_pretrained(tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "model.safetensors")
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())


@named
def test_layers_of_the_same_names_are_left_alone(made: MAKE, tower: Tower) -> None:
    """As compressed-tensors matches patterns, whether the model has its head, or is as vLLM has it."""
    own = made(tower)
    source = opened(own.packed)
    assert source.whole is not None
    settings = read_config(own.packed)["quantization_config"]
    targets = [target for group in settings["config_groups"].values() for target in group["targets"]]

    def groups(module: str, patterns: list[str]) -> int:
        return sum(bool(re.match(pattern.removeprefix("re:"), module)) for pattern in patterns)

    for name in source.packed:
        module = source.whole.in_memory(name).removesuffix(".weight")
        bare = module.removeprefix("model.")
        for path in (module, bare, bare.replace("language_model.", "language_model.model.")):
            assert (groups(path, targets), groups(path, settings["ignore"])) == (1, 0)
    model = stock(tower)
    seen_with = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    seen_with = [name for name in seen_with if ".language_model." not in name]
    assert len(seen_with) > 4
    assert {groups(name, targets) for name in seen_with} == {0}
    assert {groups(name, settings["ignore"]) for name in seen_with} == {1}
    grids = {name: packed.grid for name, packed in source.packed.items()}
    files = list(source.whole.in_files(source.tensors).values())
    assert quantization_config(grids, files, tower.text, source.whole)["config_groups"] == settings["config_groups"]


@pytest.mark.parametrize(
    ("tower", "form"),
    [
        pytest.param(tower, form, id=tower.stock)
        for tower in SEEN
        for kind, form in zip(NAMED, ("packed", "low"), strict=True)
        if tower.model_type == kind
    ],
)
def test_healed(made: MAKE, tmp_path: Path, tower: Tower, form: str) -> None:
    """What was trained is in the result, as the record says, and nothing else has changed."""
    own = made(tower)
    start = own.packed
    if form == "low":
        start = tmp_path / "low"
        convert(own.dense, start, keep=0.5, device="cpu")
    heal(start, own.dense, own.calibration, tmp_path / "healed", steps=8, lr=2e-3, device="cpu")
    source = opened(start)
    assert source.whole is not None
    trained = {source.whole.written(name) for name in trained_names(source)}
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "healed"))
    assert {name for name, tensor in before.items() if not torch.equal(tensor, after[name])} == trained
    assert all(check.passed for check in verify(tmp_path / "healed", against=own.dense))


def adapted(folder: Path, out: Path) -> Any:
    """A model with an adapter at every linear layer, saved; random weights, so that every one of it matters."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(load(folder), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    model.peft_config["default"].target_modules = "all-linear"  # so that other layers can be put in the file
    model.save_pretrained(out)
    return model.base_model.model


@named
def test_an_adapter_folded_in(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """Into the language model and into what it sees with; the sums of packed weights are plain ones."""
    pytest.importorskip("compressed_tensors")
    own = made(tower)
    expected, plain = both(adapted(own.packed, tmp_path / "adapter")), both(load(own.packed))
    fold(own.packed, tmp_path / "adapter", tmp_path / "out", device="cpu")
    assert all(check.passed for check in verify(tmp_path / "out"))
    for ours, theirs, start in zip(both(load(tmp_path / "out")), expected, plain, strict=True):
        assert distance(ours, theirs) < 1e-4
        assert distance(ours, start) > 1e-2
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(tower.vision[0] in name for name in weights)
    name = next(name for name in weights if ".language_model." in name)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    for other, message in (
        ("model.vision_tower.none", r"the adapter changes model\.vision_tower\.none, which"),
        ("model.language_model.norm", "has a weight of shape .*, which is no linear layer's"),
    ):
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        changed = {key.replace(f".{module}.lora_", f".{other}.lora_"): weight for key, weight in weights.items()}
        save_file(changed, path)
        with pytest.raises(InputError, match=message):
            fold(own.packed, tmp_path / "adapter", tmp_path / "other", device="cpu")


@pytest.mark.parametrize(
    "tower", [tower for tower in SEEN if tower.model_type == NAMED[0]], ids=lambda tower: tower.stock
)
def test_what_can_be_had(made: MAKE, tower: Tower) -> None:
    """Ranks beside bits; what it sees with is in the bytes, and is not read for a token of an answer."""
    own = made(tower)
    found = options(own.dense, calibration=own.calibration, device="cpu")
    dense, source = found.ways[0], opened(own.dense)
    assert {way.kind for way in found.ways} >= {"dense", "all alike", "rank alone", "rank and bits"}
    weights = sum(tensor.nbytes for tensor in read_weights(own.dense).values())
    assert weights < dense.bytes < weights + 20_000
    embedding = source.tensors[tower.text.embedding].nbytes
    looked_up = 0 if tower.text.is_tied(source.config) else embedding
    assert dense.read_bytes == sum(info.nbytes for info in source.tensors.values()) - looked_up


@named
def test_saved_without_a_head(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """Files of the base model are read where the head is the embedding, and else refused by what is missing."""
    model = stock(tower)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    if not tied:
        model.model.save_pretrained(tmp_path / "headless")
        with pytest.raises(InputError, match=rf"without the head .*save the whole {tower.dense_class}"):
            convert(tmp_path / "headless", tmp_path / "out", keep=0.6, device="cpu")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    assert any(name.startswith("language_model.") for name in weights)
    for name in ("whole", "base"):
        convert(tmp_path / name, tmp_path / f"{name}-low", keep=0.6, device="cpu")
    assert all(check.passed for check in verify(tmp_path / "base-low", against=tmp_path / "whole"))
    for ours, theirs in zip(*(both(load(tmp_path / f"{name}-low")) for name in ("base", "whole")), strict=True):
        assert distance(ours, theirs) < 1e-6
    assert isinstance(load(tmp_path / "base-low"), transformers.PreTrainedModel)
