"""What save_pretrained writes, and that every supported version of transformers reads it."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from support.tiny_factored import (
    AUTO_MAP,
    GEOMETRY,
    LAYOUTS,
    MODELING_FILE,
    ONE_LAYOUT,
    ROTARY_V4,
    ROTARY_V5,
    distance,
    load,
    logits,
    read_config,
    saved_tensors,
    stock_model,
    write_checkpoint,
    write_config,
)
from transformers import AutoConfig, AutoModel

OTHER_PYTHON = "SVDCONVERT_OTHER_PYTHON"


def assert_sound(folder, tensors):
    """The folder is a checkpoint as the converter writes it, with exactly these tensors."""
    assert (folder / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    config = read_config(folder)
    assert config["model_type"] == "polyglot_svd"
    assert config["auto_map"] == AUTO_MAP
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["rotary_emb_base"] == config["rope_parameters"]["rope_theta"] == 10000
    saved = saved_tensors(folder)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[key], tensors[key]) for key in tensors)


def test_round_trip(tiny, model, ids, expected, tmp_path):
    model.save_pretrained(tmp_path)
    assert_sound(tmp_path, tiny.tensors)
    config = read_config(tmp_path)
    assert config["architectures"] == ["PolyglotSVDForCausalLM"]
    assert config["svd_layout"] == tiny.svd_layout
    assert config["svd_shared"] == tiny.shared
    assert {key: config[key] for key in ("svd_ranks", "vocab_size", "bos_token_id", "eos_token_id")} == {
        key: tiny.config[key] for key in ("svd_ranks", "vocab_size", "bos_token_id", "eos_token_id")
    }
    again = load(tmp_path)
    again.save_pretrained(tmp_path / "twice")
    assert_sound(tmp_path / "twice", tiny.tensors)
    assert distance(logits(load(tmp_path / "twice"), ids), expected) < 2e-5


def test_layers_laid_out_for_decoding(tiny, ids, expected, tmp_path):
    model = load(tiny.path)
    assert model.for_decoding() is model
    ups = [model.gpt_neox.get_submodule(path).up.weight for path in tiny.ranks]
    assert all(up.stride() == (1, up.shape[0]) for up in ups)
    assert distance(logits(model, ids), expected) < 2e-5
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4), load(tiny.path).generate(ids[:1], max_new_tokens=4))
    model.save_pretrained(tmp_path)
    assert_sound(tmp_path, tiny.tensors)
    model(ids).logits.sum().backward()
    assert all(up.grad is not None for up in ups)
    half = load(tiny.path).to(torch.bfloat16).for_decoding()  # gains nothing there
    assert all(half.gpt_neox.get_submodule(path).up.weight.is_contiguous() for path in tiny.ranks)


def test_base_model_round_trip(tiny, ids, tmp_path):
    AutoModel.from_pretrained(tiny.path, trust_remote_code=True).save_pretrained(tmp_path)
    assert read_config(tmp_path)["auto_map"] == AUTO_MAP
    model, info = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
        assert distance(hidden, stock_model(tiny.product).gpt_neox(ids).last_hidden_state) < 2e-5


def test_class_imported_directly_saves_a_complete_checkpoint(tiny, ids, expected, tmp_path):
    """Not through Auto*, so nobody but the file itself can have it copied and auto_map written."""
    spec = importlib.util.spec_from_file_location(MODELING_FILE.stem, MODELING_FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # save_pretrained looks the file up there
    try:
        spec.loader.exec_module(module)
        config = module.PolyglotSVDConfig(
            **GEOMETRY, **ROTARY_V4, svd_ranks=tiny.ranks, svd_layout=tiny.svd_layout, svd_shared=tiny.shared
        )
        model = module.PolyglotSVDForCausalLM(config)
        missing, unexpected = model.load_state_dict(tiny.tensors, strict=False)
        assert not unexpected
        assert not {key for key in missing if key in tiny.tensors}
        model.save_pretrained(tmp_path)
    finally:
        del sys.modules[spec.name]
    assert_sound(tmp_path, tiny.tensors)
    assert distance(logits(load(tmp_path), ids), expected) < 2e-5


def test_auto_map_of_a_hub_repository_is_made_local(model, tiny, tmp_path):
    """The saved folder holds its own code, so it must not run what a repository holds by the time it is loaded."""
    model.config.auto_map = {auto: f"someone/something--{name}" for auto, name in AUTO_MAP.items()}
    model.save_pretrained(tmp_path)
    assert_sound(tmp_path, tiny.tensors)


# -- rotary settings, of which versions 4 and 5 each drop the other's spelling ----------------------------------------


@ONE_LAYOUT
@pytest.mark.parametrize("rotary", [ROTARY_V4, ROTARY_V5, {**ROTARY_V4, **ROTARY_V5}], ids=["v4", "v5", "both"])
def test_rotary_spellings(tmp_path, ids, expected, rotary):
    folder = write_checkpoint(tmp_path / "rotary").path
    config = {k: v for k, v in read_config(folder).items() if k not in {**ROTARY_V4, **ROTARY_V5}}
    write_config(folder, {**config, **rotary})
    model = load(folder)
    assert distance(logits(model, ids), expected) < 2e-5
    model.save_pretrained(tmp_path / "again")
    assert {**ROTARY_V4, **ROTARY_V5}.items() <= read_config(tmp_path / "again").items()
    assert distance(logits(load(tmp_path / "again"), ids), expected) < 2e-5


@ONE_LAYOUT
def test_rotary_pct_matters(tiny, ids, expected):
    assert distance(logits(stock_model(tiny.product, rotary_pct=0.25), ids), expected) > 0.01


def test_rotary_defaults_are_those_of_gpt_neox(tiny, tmp_path):
    config = {k: v for k, v in tiny.config.items() if k not in {**ROTARY_V4, **ROTARY_V5}}
    write_config(tmp_path, config)
    (tmp_path / MODELING_FILE.name).write_bytes(MODELING_FILE.read_bytes())
    AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).save_pretrained(tmp_path / "again")
    saved = read_config(tmp_path / "again")
    assert (saved["rotary_pct"], saved["rotary_emb_base"]) == (0.25, 10000)


@pytest.mark.parametrize(
    ("key", "value", "stated"),
    [("rotary_pct", 0.25, "rotary_pct=0.25, but 0.5"), ("rotary_emb_base", 500, "rotary_emb_base=500, but 10000")],
)
def test_contradictory_rotary_spellings(tmp_path, key, value, stated):
    folder = write_checkpoint(tmp_path / "torn", config={key: value}).path
    with pytest.raises(ValueError, match=stated):
        load(folder)


@ONE_LAYOUT
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_in_either_spelling(tmp_path, ids, expected, tiny, spelling):
    scaling = {"rope_type": "linear", "factor": 2.0}
    if spelling == "rope_parameters":
        settings = {"rope_parameters": {**ROTARY_V5["rope_parameters"], **scaling}}
    else:
        settings = {"rope_scaling": scaling}
    folder = write_checkpoint(tmp_path / "scaled", config=settings).path
    reference = logits(stock_model(tiny.product, rope_scaling=dict(scaling)), ids)
    assert distance(reference, expected) > 0.01
    model = load(folder)
    assert distance(logits(model, ids), reference) < 2e-5
    model.save_pretrained(tmp_path / "again")
    saved = read_config(tmp_path / "again")
    assert saved["rope_scaling"] == scaling
    assert scaling.items() <= saved["rope_parameters"].items()
    assert distance(logits(load(tmp_path / "again"), ids), reference) < 2e-5


# -- across versions ---------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[2:]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder / "here", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[1])).logits, folder / "logits.pt")
    model.save_pretrained(folder / "there")
"""


@pytest.mark.skipif(not os.environ.get(OTHER_PYTHON), reason=f"{OTHER_PYTHON}: no interpreter of another environment")
def test_saved_here_loaded_there_and_back(ids, tmp_path):
    """All layouts in one process over there: importing transformers is what takes time."""
    torch.save(ids, tmp_path / "ids.pt")
    made = {}
    for layout in LAYOUTS:
        folder = tmp_path / layout
        made[folder] = write_checkpoint(folder / "made", layout=layout)
        load(made[folder].path).save_pretrained(folder / "here")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [os.environ[OTHER_PYTHON], "-c", ELSEWHERE, tmp_path / "ids.pt", *made]
    run = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for folder, tiny in made.items():
        here, there = folder / "here", folder / "there"
        assert read_config(there)["transformers_version"] != read_config(here)["transformers_version"]
        expected = logits(stock_model(tiny.product), ids)
        assert distance(torch.load(folder / "logits.pt"), expected) < 2e-5
        assert_sound(there, tiny.tensors)
        again, info = load(there, output_loading_info=True)
        assert not any(info.values())
        assert distance(logits(again, ids), expected) < 2e-5
