"""Models that see: their language model is factored, and everything else stays what it was."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights
from support.families import VERSION, rewrite_config
from support.running import distance
from support.towers import SEEN, both, load, pictures, settings, words, write

from svdconvert import Calibration, convert, densify, evaluate, heal, verify
from svdconvert.errors import InputError
from svdconvert.families.table import dense_architecture
from svdconvert.families.tower import Tower
from svdconvert.families.towers import FACTORED_TOWERS, TOWERS, language_config
from svdconvert.jobs.model_files import modeling_source
from svdconvert.layouts.table import LAYOUTS
from svdconvert.models.loading import load_model
from svdconvert.storage.source import LocalSource

seen = pytest.mark.parametrize("tower", SEEN, ids=lambda tower: tower.svd_model_type)
# of either kind: built by the config of its language model, and with classes of its own for that
KINDS = ("gemma3", "qwen2_5_vl")
kinds = pytest.mark.parametrize(
    "tower", [tower for tower in SEEN if tower.model_type in KINDS], ids=lambda tower: tower.stock
)
SIZES = {
    "vocab_size": 152064,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
}
MISTRAL_SMALL = {
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "head_dim": 128,
    "vocab_size": 131072,
    "model_type": "mistral",
}
MAKE = Callable[[Tower], SimpleNamespace]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MAKE:
    """A tiny model that sees, converted at low rank, and densified, each once. Read only."""
    known: dict[str, SimpleNamespace] = {}

    def make(tower: Tower) -> SimpleNamespace:
        if tower.svd_model_type not in known:
            folder = tmp_path_factory.mktemp(tower.svd_model_type)
            model = write(folder / "dense", tower)
            convert(folder / "dense", folder / "low", keep=0.6, device="cpu")
            densify(folder / "low", folder / "densified", device="cpu")
            known[tower.svd_model_type] = SimpleNamespace(
                folder=folder, stock=model, dense=folder / "dense", low=folder / "low"
            )
        return known[tower.svd_model_type]

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and ate a fish\n" * 60, encoding="utf-8")
    return path


def in_memory(made: SimpleNamespace, out: Path) -> Path:
    """The same model with the names that transformers has in memory, and in some files."""
    out.mkdir()
    weights = {name: tensor.clone() for name, tensor in made.stock.state_dict().items()}
    if made.stock.lm_head.weight is made.stock.get_input_embeddings().weight:
        del weights["lm_head.weight"]
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((made.dense / "config.json").read_bytes())
    return out


def copy_with(folder: Path, out: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A folder with other weights."""
    out.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def beside(folder: Path) -> list[str]:
    """Names of the tensors that are not of the language model."""
    whole = LocalSource(folder).whole
    assert whole is not None
    return list(whole.rest)


@pytest.mark.parametrize(
    ("tower", "layout"),
    [
        pytest.param(tower, layout, id=f"{tower.svd_model_type}-{layout}")
        for tower in SEEN
        for layout in LAYOUTS
        if layout == "pivoted" or tower.model_type in KINDS
    ],
)
def test_full_rank_is_the_stock_model(made: MAKE, tmp_path: Path, tower: Tower, layout: str) -> None:
    """Of a text, and of a text with an image; from the names of published files, and from those in memory."""
    own = made(tower)
    source = own.dense if layout == "balanced" else in_memory(own, tmp_path / "in_memory")
    layers = dict(own.stock.model.language_model.named_parameters())
    ranks = {
        name.removesuffix(".weight"): min(weight.shape)
        for name, weight in layers.items()
        if name.endswith("_proj.weight")
    }
    convert(source, tmp_path / "out", rank=ranks, factor_all=True, layout=layout, device="cpu")
    model, expected = load(tmp_path / "out"), both(own.stock)
    for ours, theirs in zip(both(model), expected, strict=True):
        assert distance(ours, theirs) < 1e-4
    given = pictures(model)
    with torch.no_grad():
        other = model(**given | {"pixel_values": -given["pixel_values"]}).logits
    assert distance(other, expected[1]) > 1e-2


@seen
def test_what_is_written(made: MAKE, tower: Tower) -> None:
    """All that is not the language model is there, byte by byte; config.json is the whole's, with its own code."""
    own = made(tower)
    before, after = read_weights(own.dense), read_weights(own.low)
    names = beside(own.dense)
    assert names == beside(own.low)
    vision = sum(len(list(own.stock.model.get_submodule(name).parameters())) for name in tower.vision)
    assert len(names) == vision
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in names)
    processor = "preprocessor_config.json"
    assert (own.low / processor).read_bytes() == (own.dense / processor).read_bytes()
    assert (own.low / f"{tower.modeling}.py").read_bytes() == modeling_source(tower)
    config, source = read_config(own.low), read_config(own.dense)
    known = transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES
    assert config["processor_class"] == known[tower.model_type]
    assert config["auto_map"] == tower.auto_map
    assert config["vision_config"] == source["vision_config"]
    assert config["text_config"]["svd_ranks"]
    assert LocalSource(own.low).config["model_type"] == tower.text.svd_model_type
    assert all(check.passed for check in verify(own.low, against=own.dense))


@pytest.mark.parametrize("tower", SEEN[-1:], ids=lambda tower: tower.svd_model_type)
def test_a_processor_that_no_file_names(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """Is that of the dense model, and not a tokenizer alone."""
    pytest.importorskip("PIL")
    own = made(tower)
    for folder in (own.dense, own.low):
        place = copy_with(folder, tmp_path / folder.name, {})
        (place / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
        found = transformers.AutoProcessor.from_pretrained(place, trust_remote_code=True)
        assert type(found).__name__ == "LlavaProcessor"


@seen
def test_densified_and_saved_again(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """The stock class of the product, what is saved here, and the files' own model all give the same, and generate."""
    own = made(tower)
    model, stock = load(own.low), load(own.folder / "densified")
    assert type(stock).__name__ == tower.dense_class
    assert read_config(own.folder / "densified")["model_type"] == tower.model_type
    assert read_weights(own.folder / "densified").keys() == read_weights(own.dense).keys()
    for ours, theirs in zip(both(model), both(stock), strict=True):
        assert distance(ours, theirs) < 1e-4
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for given in (words(), pictures(model)):
        assert torch.equal(model.generate(**given, **options), stock.generate(**given, **options))
    model.save_pretrained(tmp_path)
    assert read_weights(tmp_path).keys() == read_weights(own.low).keys()
    config, first = read_config(tmp_path), read_config(own.low)
    assert config["auto_map"] == tower.auto_map
    if tower.own:  # for the version that reads the one spelling, and for the one that reads the other
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            assert config["text_config"][name] == first["text_config"][name]
        assert config["text_config"]["rope_scaling"]["mrope_section"] == tower.tiny["rope_scaling"]["mrope_section"]
    assert distance(both(load(tmp_path))[1], both(model)[1]) == 0
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForImageTextToText.from_pretrained(own.low, trust_remote_code=False)


@seen
def test_text_alone_is_what_the_whole_reads(made: MAKE, tower: Tower) -> None:
    """Of padded texts, too; and the model without its head, as serving engines build it."""
    own = made(tower)
    whole, alone = load(own.low), load_model(own.low, "cpu", torch.float32)
    mask = torch.ones_like(words()["input_ids"])
    mask[0, :5] = 0
    with torch.no_grad():
        assert distance(alone(**words()).logits, whole(**words()).logits) < 1e-5
        ours, theirs = (model(**words(), attention_mask=mask).logits[mask.bool()] for model in (alone, whole))
    assert distance(ours, theirs) < 1e-5
    if tower.model_type == "qwen3_vl" and VERSION < (5, 0):  # which loads no weights into the stock one, either
        return
    base = load(own.low, transformers.AutoModel)
    with torch.no_grad():
        hidden = base(**words()).last_hidden_state
        assert distance(whole.lm_head(hidden), whole(**words()).logits) < 1e-5


@kinds
def test_text_alone_is_measured(made: MAKE, text: Path, tower: Tower) -> None:
    """Calibrated, evaluated, healed, verified."""
    own = made(tower)
    calibrated, healed = own.folder / "calibrated", own.folder / "healed"
    calibration = Calibration(text, samples=8, length=32)
    convert(own.dense, calibrated, keep=0.6, calibration=calibration, device="cpu")
    assert evaluate(calibrated, text, device="cpu", against=own.dense).tokens > 0
    heal(calibrated, own.dense, calibration, healed, steps=2, device="cpu")
    assert read_weights(healed).keys() == read_weights(calibrated).keys()
    assert all(check.passed for check in verify(healed))
    assert load(healed) is not None


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.skipif(VERSION < (4, 57), reason="it needs transformers 4.57")
def test_published_configs_of_one_level(made: MAKE, tmp_path: Path, name: str) -> None:
    """With the fields of the language model beside those of the whole."""
    own = made(FACTORED_TOWERS[f"{name}_svd"])
    flat = copy_with(own.dense, tmp_path / "flat", read_weights(own.dense))
    config = read_config(flat)
    inner = config.pop("text_config")
    tiny = settings(FACTORED_TOWERS[f"{name}_svd"])["text_config"]
    for spelling in ("rope_parameters", "rope_scaling", "rope_theta", "model_type"):
        inner.pop(spelling, None)
    inner |= {"rope_theta": tiny["rope_theta"], "rope_scaling": tiny["rope_scaling"]}
    (flat / "config.json").write_text(json.dumps(inner | config))
    convert(flat, tmp_path / "out", keep=0.6, device="cpu")
    made_of, usual = read_config(tmp_path / "out"), read_config(own.low)
    assert {**made_of, "transformers_version": ""} == {**usual, "transformers_version": ""}
    assert all(
        torch.equal(tensor, read_weights(own.low)[key]) for key, tensor in read_weights(tmp_path / "out").items()
    )
    rewrite_config(flat, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": tiny["rope_theta"]})
    with pytest.raises(InputError, match='rope_type "default" in rope_scaling, but "yarn" in rope_parameters'):
        dense_architecture(LocalSource(flat).config, "it")
    rewrite_config(flat, rope_theta=None, rope_parameters=None)
    with pytest.raises(InputError, match="does not say the rope_theta of its language model"):
        LocalSource(flat)


@kinds
def test_a_type_of_weights_is_the_language_models(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """What it sees with is copied as it is, and loaded in the type of config.json."""
    own = made(tower)
    convert(own.dense, tmp_path / "out", keep=0.6, dtype="bfloat16", device="cpu")
    types, names = {name: tensor.dtype for name, tensor in read_weights(tmp_path / "out").items()}, beside(own.dense)
    assert {types[name] for name in names} == {torch.float32}
    assert torch.bfloat16 in types.values()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype="auto"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@kinds
def test_a_missing_factor_is_told(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    weights = read_weights(made(tower).low)
    lost = next(name for name in weights if name.endswith(".up.weight"))
    copy_with(made(tower).low, tmp_path, {name: t for name, t in weights.items() if name != lost})
    with pytest.raises(ValueError, match="lacks factors for svd_ranks"):
        load(tmp_path)


@seen
def test_lora_beside_the_whole_product(made: MAKE, tower: Tower) -> None:
    """Where the card says; the vision tower has layers of the same names."""
    peft = pytest.importorskip("peft")
    low = made(tower).low
    told = re.search(r"target_modules = (.*)", (low / "README.md").read_text(encoding="utf-8"))
    assert told is not None
    config = peft.LoraConfig(r=2, target_modules=ast.literal_eval(told[1]))
    model = peft.get_peft_model(load(low), config)
    names = [name for name, part in model.named_modules() if hasattr(part, "lora_A")]
    assert len(names) == 21
    assert all(".language_model.layers." in name for name in names)
    assert not any(name.endswith((".down", ".up")) for name in names)
    model(**pictures(model.base_model.model)).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


@kinds
def test_changes_beside_the_language_model_are_found(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """By `verify`, in a copied tensor; and before a conversion, where one is missing."""
    own = made(tower)
    weights, name = read_weights(own.dense), beside(own.dense)[0]
    changed = copy_with(own.dense, tmp_path / "changed", {**weights, name: weights[name] + 1})
    assert [check.name for check in verify(own.low, against=changed) if not check.passed] == ["copied tensors"]
    count = len(beside(own.dense))
    copy_with(own.dense, changed, {key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(InputError, match=f"has {count - 1} tensors beside .* there are {count} in {tower.vision[0]}"):
        convert(changed, tmp_path / "out", keep=0.5, device="cpu")


@kinds
def test_a_lost_part_of_a_result_is_found(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    """By `verify` alone, where no record tells what there was, and before anything is made of it."""
    saved = tmp_path / "saved"
    load(made(tower).low).save_pretrained(saved)
    weights, lost = read_weights(saved), beside(saved)[0]
    count = len(beside(saved))
    for change, message in (
        ({}, f"has {count - 1} tensors beside its language model, but by its config.json there are {count} in"),
        (
            {lost: weights[lost][:-1].clone()},
            f"has {count} tensors .*, but by its config.json some are of other shapes",
        ),
    ):
        kept = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(kept | change, saved / "model.safetensors", {"format": "pt"})
        (check,) = (check for check in verify(saved) if not check.passed)
        assert check.name == "keys and shapes"
        assert re.search(message, check.detail)
        with pytest.raises(InputError, match=message):
            densify(saved, tmp_path / "out", device="cpu")


@kinds
def test_what_is_refused(made: MAKE, tmp_path: Path, tower: Tower) -> None:
    own = made(tower)
    bare = in_memory(own, tmp_path / "bare")
    config = read_config(bare)
    for change, message in (
        ({"text_config": None}, "has no text_config"),
        ({"text_config": {**config["text_config"], "model_type": "bert"}}, "text_config.model_type 'bert'"),
    ):
        (bare / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            LocalSource(bare)
    (bare / "config.json").write_text(json.dumps(config))
    save_file({f"{tower.vision[0]}.x": torch.ones(1)}, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its language model is not there"):
        LocalSource(bare)


def test_a_language_model_that_does_not_convert_is_named() -> None:
    config = {"model_type": "mistral3", "text_config": {"model_type": "bert"}}
    with pytest.raises(InputError, match=r"'bert', .* 'mistral3' is converted where it is 'mistral' or 'ministral3'"):
        language_config(config, "it")


@seen
def test_fields_that_published_configs_leave_out(tower: Tower) -> None:
    """Are those that the class of the language model has by default, wherever the class of its family has others."""
    inner = getattr(transformers, f"{tower.rendered.inner}Config")
    own, usual = inner().to_dict(), getattr(transformers, f"{tower.text.inner}Config")().to_dict()
    assert {name: own[name] for name in tower.defaults if name != "tie_word_embeddings"} == {
        name: value for name, value in tower.defaults.items() if name != "tie_word_embeddings"
    }
    known = {*tower.defaults, "model_type", "rope_theta", "rope_parameters", "rope_scaling", "sliding_window"}
    differing = {name for name, value in own.items() if name in usual and usual[name] != value}
    assert {name for name in differing - known if not name.endswith("_token_id")} <= {"layer_types"}


@pytest.mark.skipif(VERSION < (5, 0), reason="its language model needs transformers 5")
def test_parameters_of_a_published_config() -> None:
    """Of Gemma 3 4B: 3.88 billion in its language model."""
    tower = FACTORED_TOWERS["gemma3_svd"]
    inner = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    shapes = tower.text.parameters(tower.text_config({"model_type": "gemma3", "text_config": inner}, "it"))
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**inner))
    found: dict[str, Any] = {name: tuple(p.shape) for name, p in model.named_parameters() if "lm_head" not in name}
    assert found == shapes


@pytest.mark.parametrize(
    ("tower", "config", "parameters"),
    [
        ("qwen2_5_vl_svd", {**SIZES, "hidden_size": 3584, "intermediate_size": 18944}, 7_615_616_512),
        ("mistral3_svd", {"text_config": MISTRAL_SMALL}, 23_572_403_200),
    ],
)
def test_language_models_of_published_configs(tower: str, config: dict[str, Any], parameters: int) -> None:
    """Of Qwen2.5-VL 7B, which has one level, and of Mistral Small 3.1."""
    row = FACTORED_TOWERS[tower]
    found = row.text_config({"model_type": row.model_type, "vision_config": {}, **config}, "it")
    assert sum(math.prod(shape) for shape in row.text.parameters(found).values()) == parameters


@pytest.mark.parametrize("tower", [tower for tower in TOWERS if tower not in SEEN], ids=lambda tower: tower.stock)
def test_an_older_transformers_is_refused_by_name(tower: Tower) -> None:
    needed = re.escape(".".join(map(str, tower.since)))
    with pytest.raises(ImportError, match=f"that sees needs transformers {needed} or newer, and"):
        importlib.import_module(f"svdconvert.modeling.{tower.modeling}")
