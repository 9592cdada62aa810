"""Models that see: their language model is factored, and everything else stays what it was."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights, write_tokenizer
from support.families import COMMON, VERSION
from support.running import distance
from torch import Tensor

from svdconvert import Calibration, convert, densify, evaluate, heal, verify
from svdconvert.errors import InputError
from svdconvert.families.tower import TOWERS
from svdconvert.jobs.model_files import modeling_source
from svdconvert.models.loading import load_model
from svdconvert.storage.source import LocalSource

pytestmark = pytest.mark.skipif(VERSION < (5, 0), reason="their language model needs transformers 5")

IMAGE = 159
TEXT = torch.randint(4, 150, (2, 12), generator=torch.Generator().manual_seed(0))
SEEN = TEXT.clone()
SEEN[:, 2:6] = IMAGE
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
TOWER = TOWERS["gemma3"]


def seeing(model: Any, **options: Any) -> dict[str, Tensor]:
    return {"input_ids": SEEN, "pixel_values": PIXELS, "token_type_ids": (SEEN == IMAGE).long(), **options}


def both(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of a text, and of one with an image."""
    with torch.no_grad():
        return model(input_ids=TEXT).logits, model(**seeing(model)).logits


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def old_names(folder: Path, out: Path) -> Path:
    """The same model with the names of published files, and a config that leaves out what they leave out."""
    out.mkdir()
    weights = read_weights(folder)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny model that sees, converted in both layouts at full and at low rank, and densified. Read only."""
    folder = tmp_path_factory.mktemp("towers")
    text = {**COMMON, **TOWER.text.tiny}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "dense")
    write_tokenizer(folder / "dense")
    (folder / "dense" / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    convert(folder / "dense", folder / "low", keep=0.6, device="cpu")
    densify(folder / "low", folder / "densified", device="cpu")
    words = folder / "text.txt"
    words.write_text("the cat sat on the mat and ate a fish\n" * 60, encoding="utf-8")
    return SimpleNamespace(folder=folder, stock=model, dense=folder / "dense", low=folder / "low", words=words)


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
def test_full_rank_is_the_stock_model(made: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    """Of a text, and of a text with an image, from names of published files."""
    published = old_names(made.dense, tmp_path / "published")
    shapes = {name: tuple(t.shape) for name, t in read_weights(made.dense).items() if "_proj.weight" in name}
    ranks = {
        name.removeprefix("language_model.model.").removesuffix(".weight"): min(shape)
        for name, shape in shapes.items()
        if name.startswith("language_model.")
    }
    convert(published, tmp_path / "out", rank=ranks, factor_all=True, layout=layout, device="cpu")
    for ours, theirs in zip(both(load(tmp_path / "out")), both(made.stock), strict=True):
        assert distance(ours, theirs) < 1e-4


def test_what_is_written(made: SimpleNamespace) -> None:
    """All that is not the language model is there, byte by byte; config.json is the whole's, with its own code."""
    before, after = read_weights(made.dense), read_weights(made.low)
    beside = {name for name in before if not name.startswith("language_model.")}
    assert beside == {name for name in after if not name.startswith("language_model.")}
    assert any(name.startswith("vision_tower.") for name in beside)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in beside)
    assert (made.low / "preprocessor_config.json").read_bytes() == (
        made.dense / "preprocessor_config.json"
    ).read_bytes()
    assert (made.low / f"{TOWER.modeling}.py").read_bytes() == modeling_source(TOWER)
    config, source = read_config(made.low), read_config(made.dense)
    assert config["auto_map"] == TOWER.auto_map
    assert config["vision_config"] == source["vision_config"]
    assert config["text_config"]["svd_ranks"]
    assert LocalSource(made.low).config["model_type"] == "gemma3_text_svd"


def test_densified_and_saved_again(made: SimpleNamespace, tmp_path: Path) -> None:
    """The stock class of the product, what is saved here, and the files' own model all give the same, and generate."""
    model, stock = load(made.low), load(made.folder / "densified")
    assert type(stock).__name__ == TOWER.dense_class
    assert read_config(made.folder / "densified")["model_type"] == "gemma3"
    assert read_weights(made.folder / "densified").keys() == read_weights(made.dense).keys()
    for ours, theirs in zip(both(model), both(stock), strict=True):
        assert distance(ours, theirs) < 1e-4
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**seeing(model, **options)), stock.generate(**seeing(stock, **options)))
    model.save_pretrained(tmp_path)
    assert read_weights(tmp_path).keys() == read_weights(made.low).keys()
    assert read_config(tmp_path)["auto_map"] == TOWER.auto_map
    assert distance(both(load(tmp_path))[1], both(model)[1]) == 0
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForImageTextToText.from_pretrained(made.low, trust_remote_code=False)


def test_a_missing_factor_is_told(made: SimpleNamespace, tmp_path: Path) -> None:
    weights = read_weights(made.low)
    lost = next(name for name in weights if name.endswith(".up.weight"))
    for path in made.low.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(
        {name: t for name, t in weights.items() if name != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lacks factors for svd_ranks"):
        load(tmp_path)


def test_text_alone_is_measured(made: SimpleNamespace) -> None:
    """As the whole model reads it: loaded here, evaluated, verified, healed."""
    model = load_model(made.low, "cpu", torch.float32)
    with torch.no_grad():
        assert distance(model(input_ids=TEXT).logits, both(load(made.low))[0]) < 1e-5
    assert all(check.passed for check in verify(made.low, against=made.dense))
    found = evaluate(made.low, made.words, device="cpu", against=made.dense)
    assert found.tokens > 0
    healed = made.folder / "healed"
    heal(made.low, made.dense, Calibration(made.words), healed, steps=2, device="cpu")
    assert read_weights(healed).keys() == read_weights(made.low).keys()
    assert all(check.passed for check in verify(healed))
    assert load(healed) is not None


def test_lora_beside_the_whole_product(made: SimpleNamespace) -> None:
    """Where the card says; the vision tower has layers of the same names."""
    peft = pytest.importorskip("peft")
    told = re.search(r"target_modules = (.*)", (made.low / "README.md").read_text(encoding="utf-8"))
    assert told is not None
    settings = peft.LoraConfig(r=2, target_modules=ast.literal_eval(told[1]))
    model = peft.get_peft_model(load(made.low), settings)
    names = [name for name, part in model.named_modules() if hasattr(part, "lora_A")]
    assert len(names) == 21
    assert all(".language_model.layers." in name for name in names)
    assert not any(name.endswith((".down", ".up")) for name in names)
    model(**seeing(model)).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_changes_beside_the_language_model_are_found(made: SimpleNamespace, tmp_path: Path) -> None:
    """By `verify`, in a copied tensor; and before a conversion, where one is missing."""
    weights = read_weights(made.dense)
    name = "multi_modal_projector.mm_soft_emb_norm.weight"
    changed = old_names(made.dense, tmp_path / "changed")
    save_file({**weights, name: weights[name] + 1}, changed / "model.safetensors", {"format": "pt"})
    assert [check.name for check in verify(made.low, against=changed) if not check.passed] == ["copied tensors"]
    del weights[name]
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"49 tensors beside its language model, but .* 50 in vision_tower"):
        convert(changed, tmp_path / "out", keep=0.5, device="cpu")


def test_a_lost_part_of_a_result_is_found(made: SimpleNamespace, tmp_path: Path) -> None:
    """By `verify` alone, where no record tells what there was, and before anything is made of it."""
    saved = tmp_path / "saved"
    load(made.low).save_pretrained(saved)
    weights = read_weights(saved)
    lost = "vision_tower.embeddings.patch_embedding.weight"
    for change, message in (
        ({}, "has 49 tensors beside its language model, but by its config.json there are 50 in vision_tower"),
        ({lost: weights[lost][:-1].clone()}, "has 50 tensors .*, but by its config.json some are of other shapes in"),
    ):
        kept = {name: tensor for name, tensor in weights.items() if name != lost}
        save_file(kept | change, saved / "model.safetensors", {"format": "pt"})
        (check,) = (check for check in verify(saved) if not check.passed)
        assert check.name == "keys and shapes"
        assert re.search(message, check.detail)
        with pytest.raises(InputError, match=message):
            densify(saved, tmp_path / "out", device="cpu")


def test_what_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a model that sees, whose weights are not packed"):
        convert(made.dense, tmp_path / "out", bytes=0.5, calibration=Calibration(made.words), device="cpu")
    bare = old_names(made.dense, tmp_path / "bare")
    config = read_config(bare)
    for change, message in (
        ({"text_config": None}, "has no text_config"),
        ({"text_config": {**config["text_config"], "model_type": "llama"}}, "text_config.model_type 'llama'"),
    ):
        (bare / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            LocalSource(bare)
    (bare / "config.json").write_text(json.dumps(config))
    save_file({"vision_tower.x": torch.ones(1)}, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its language model is not there"):
        LocalSource(bare)


def test_fields_that_published_configs_leave_out() -> None:
    """Those of Gemma 3 4B: 3.88 billion parameters in its language model."""
    config = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
    }
    found = TOWER.text_config(config, "it")
    stock = transformers.Gemma3TextConfig(**config["text_config"])
    assert all(getattr(stock, name) == found[name] for name in TOWER.defaults)
    shapes = TOWER.text.parameters(found)
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(stock)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
