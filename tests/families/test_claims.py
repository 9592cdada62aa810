"""What config.json claims, against the weights and against what transformers makes of it: right, or refused at once."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import pickle_weights, read_config, read_weights
from support.families import full_ranks, rewrite_config, write_family
from transformers import AutoModelForCausalLM

from svdconvert import InputError, convert, densify, evaluate, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES, dense_architecture, longest_input
from svdconvert.models.skeleton import check_stock, skeleton
from svdconvert.storage.opening import open_source

IDS = torch.arange(16)[None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def same_function(one: Path, other: Path) -> None:
    expected = logits(one)
    assert float((logits(other) - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose head is its embedding, stored once. Read only."""
    return write_family(tmp_path_factory.mktemp("tied") / "llama", "llama", tie_word_embeddings=True)


@pytest.fixture
def copy(tied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tied, tmp_path / "model"))


def full_rank(source: Path, out: Path) -> Any:
    ranks = full_ranks(ARCHITECTURES[read_config(source)["model_type"]], source)
    return convert(source, out, rank=ranks, factor_all=True, device="cpu")


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tied_head_of_the_embeddings_values(copy: Path, pickled: bool, tmp_path: Path) -> None:
    edit(copy, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    if pickled:
        pickle_weights(copy)
    report = full_rank(copy, tmp_path / "out")
    assert any(HEAD in note for note in report.plan.notes)
    assert HEAD not in read_weights(tmp_path / "out")
    same_function(copy, tmp_path / "out")
    assert not failed(verify(tmp_path / "out", str(copy)))


@pytest.mark.parametrize("row", [0, -1])
def test_a_tied_head_of_other_values(copy: Path, row: int, tmp_path: Path) -> None:
    """transformers 5 computes with the head, transformers 4 with the embedding."""
    edit(copy, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    edit(copy, lambda t: t[HEAD][row].mul_(2))
    with pytest.raises(InputError, match=f"ties {HEAD} to {EMBEDDING} .* but they differ.*tie_word_embeddings"):
        convert(copy, tmp_path / "out", rank=8, device="cpu")
    assert not (tmp_path / "out").exists()
    rewrite_config(copy, tie_word_embeddings=False)
    full_rank(copy, tmp_path / "out")
    same_function(copy, tmp_path / "out")


def test_such_a_head_of_another_shape(copy: Path) -> None:
    edit(copy, lambda t: t.update({HEAD: t[EMBEDDING][:-8].clone()}))
    with pytest.raises(InputError, match="but they differ"):
        plan(copy, rank=8)


def test_a_head_that_differs_is_found_while_converting(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository, the weights are not here before the work begins."""
    edit(copy, lambda t: t.update({HEAD: -t[EMBEDDING]}))
    monkeypatch.setattr("svdconvert.models.preflight._check_head", lambda source, row: None)
    with pytest.raises(InputError, match="but they differ"):
        convert(copy, tmp_path / "out", rank=8, device="cpu")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_tied_model_that_stores_its_head_alone(family: str, tmp_path: Path) -> None:
    source = write_family(tmp_path / "model", family, tie_word_embeddings=True)
    embedding = ARCHITECTURES[family].embedding
    edit(source, lambda t: t.update({HEAD: t.pop(embedding)}))
    full_rank(source, tmp_path / "out")
    assert embedding in read_weights(tmp_path / "out")
    same_function(source, tmp_path / "out")
    assert not failed(verify(tmp_path / "out", str(source)))
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    same_function(source, tmp_path / "densified")


# -- files -------------------------------------------------------------------------------------------------------------


def unlisted(names: dict[str, str]) -> None:
    del names["model.norm.weight"]


def elsewhere(names: dict[str, str]) -> None:
    names["model.norm.weight"] = next(file for file in names.values() if file != names["model.norm.weight"])


def buffer(names: dict[str, str]) -> None:
    names["model.layers.0.self_attn.rotary_emb.inv_freq"] = names["model.norm.weight"]


@pytest.mark.parametrize("change", [unlisted, elsewhere, buffer])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_index_that_is_not_exact(change: Callable[[dict[str, str]], None], pickled: bool, tmp_path: Path) -> None:
    """transformers takes of an index only which files there are."""
    source = write_family(tmp_path / "model", "llama", max_shard_size="100kB")
    if pickled:
        pickle_weights(source)
    (file,) = source.glob("*.index.json")
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))
    full_rank(source, tmp_path / "out")
    same_function(source, tmp_path / "out")


def test_an_adapter_beside_the_model(copy: Path, text: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    for call in (
        lambda: plan(copy, rank=8),
        lambda: convert(copy, tmp_path / "out", rank=8, device="cpu"),
        lambda: evaluate(copy, text, device="cpu"),
    ):
        with pytest.raises(InputError, match=r"adapter_config\.json beside .*merge.*svdconvert fold"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_generation_config_that_keeps_models_from_being_loaded(copy: Path, tmp_path: Path) -> None:
    (copy / "generation_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"generation_config\.json of .*model keeps the model from being loaded"):
        convert(copy, tmp_path / "out", rank=8, device="cpu")
    assert not (tmp_path / "out").exists()


# -- fields of config.json ---------------------------------------------------------------------------------------------

WRONG = {
    "num_attention_heads": ("64", 0, -1, 1.5, True, [4], 3, 10**30),
    "num_key_value_heads": ("2", 3, [], 1.5),
    "head_dim": ("16", 12, {}),
    "hidden_size": ("64", 63, None),
    "num_hidden_layers": (10**30, 10**400, 4, 2, "3", None),
    "vocab_size": (161, "160", -1),
    "model_type": ([], {}, 3),
    "torch_dtype": ("float128", ["float16"], 16, "auto"),
    "quantization_config": ("x", {}, [1], {"quant_method": "awq"}),
    "hidden_act": ("evil", 3, []),
    "rms_norm_eps": ("1e-5", [], float("nan"), 10**400, -1),
    "rope_theta": (0, -1, "x"),
    "rope_scaling": ("x", [], {"rope_type": "evil"}, *({"rope_type": "linear", "factor": f} for f in ("2", 0, -1))),
    "rope_parameters": ("x", {"rope_type": "evil"}, {"rope_type": "default", "rope_theta": -1}),
    "tie_word_embeddings": ("false", 1, []),
    "attention_bias": ("x", {}),
    "attn_implementation": ("evil", 3),
    "num_labels": (10**30,),
    "pad_token_id": (10**30, "0", 1.5),
    "sliding_window": (0, "7", -1),
    "max_position_embeddings": ("64", 1.5, -1, 10**30),
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_fields_are_one_sentence_before_the_work(field: str, copy: Path, tmp_path: Path) -> None:
    """Small at that: a number of layers or labels is nothing to make so many things for."""
    config = read_config(copy)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in WRONG[field]:
        given = {key: v for key, v in config.items() if not (field == "rope_scaling" and key == "rope_parameters")}
        (copy / "config.json").write_text(json.dumps({**given, field: value}))
        start = time.process_time()
        with pytest.raises(InputError) as caught:
            convert(copy, tmp_path / "out", rank=8, device="cpu")
        message = str(caught.value)
        assert "\n" not in message
        assert len(message) < 600
        assert "; " in message, "what to do"
        assert not (tmp_path / "out").exists()
        assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_fields_of_one_family(row: Architecture) -> None:
    """What a row says of its own fields is checked, in that family alone."""
    config = {"model_type": row.model_type, "vocab_size": 160}
    if row.refused(config):  # it is something in the other fields that is asked for
        config |= row.tiny
    assert dense_architecture(config, "it") is row
    for field, kind in row.fields.items():
        wrong: list[Any] = [{}]
        assert not kind.fits(wrong)
        assert dense_architecture({**config, "model_type": "mistral", field: wrong}, "it") is not row
        with pytest.raises(InputError, match=f"config.json of it cannot be used: its '{field}' is"):
            dense_architecture({**config, field: wrong}, "it")


@pytest.mark.parametrize("value", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn", "paged|sdpa"])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_attention_for_another_machine(field: str, value: str, copy: Path, text: Path, tmp_path: Path) -> None:
    """The tool's own looks take what there is; who loads the result gets what config.json asks for."""
    rewrite_config(copy, **{field: value})
    convert(copy, tmp_path / "out", rank=8, device="cpu")
    assert read_config(tmp_path / "out")[field] == value
    assert not failed(verify(tmp_path / "out", str(copy)))
    for folder in (copy, tmp_path / "out"):
        assert evaluate(folder, text, device="cpu").tokens > 0
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    assert read_config(tmp_path / "densified")[field] == value


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
def test_weights_that_are_taken_apart(layout: str, tmp_path: Path) -> None:
    """`pretraining_tp` of older LLaMAs: transformers 4 then reads parts of weights, which products do not have."""
    source = write_family(tmp_path / "model", "llama")
    rewrite_config(source, pretraining_tp=2)
    convert(source, tmp_path / "out", rank=8, layout=layout, device="cpu")
    assert not failed(verify(tmp_path / "out", str(source)))
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    assert read_config(tmp_path / "densified")["pretraining_tp"] == 2


def test_what_the_class_fills_in_is_not_what_the_files_have(tmp_path: Path) -> None:
    """A Mistral that does not say how many heads its keys have, has eight of them."""
    source = write_family(tmp_path / "model", "mistral", num_key_value_heads=4)
    rewrite_config(source, num_key_value_heads=None)
    with pytest.raises(InputError, match=r"transformers .* builds a model with .*k_proj.weight of shape \[256, 64\]"):
        convert(source, tmp_path / "out", rank=8, device="cpu")
    assert not (tmp_path / "out").exists()


def test_errors_of_the_program_are_not_hidden(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise AttributeError("a fault of ours")

    monkeypatch.setattr("svdconvert.models.preflight._check_weights", broken)
    with pytest.raises(AttributeError, match="a fault of ours"):
        convert(copy, tmp_path / "out", rank=8, device="cpu")


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_looks_leave_the_config_as_it_is(family: str, tmp_path: Path) -> None:
    source = open_source(str(write_family(tmp_path / "dense", family)))
    row = dense_architecture(source.config, "it")
    source.config |= row.config_overrides(source.config)  # with the rotary settings in both spellings, as it is written
    before = json.dumps(source.config)
    skeleton(source, row)
    check_stock(source.config, "it")
    assert json.dumps(source.config) == before


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len"])
@pytest.mark.parametrize("value", ["many", -1, 1.5, True])
def test_a_longest_input_is_refused_by_its_own_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"config.json says {name} {value!r}"):
        longest_input({name: value}, 7)
    assert longest_input({name: 9}, 7) == 9
    assert longest_input({}, 7) == 7
