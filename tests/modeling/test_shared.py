"""Layers that use the `down` of another one. What holds for every factored model is tested on them everywhere else."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.tiny_factored import (
    LINEARS,
    distance,
    load,
    logits,
    read_config,
    saved_tensors,
    stock_model,
    write_checkpoint,
    write_config,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from svdconvert.models.blocks import ModelBlocks
from svdconvert.storage.source import LocalSource

OWNER, SHARER = (f"layers.{n}.attention.query_key_value" for n in (0, 1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-svd", layout="shared")


@pytest.fixture(scope="module")
def expected(tiny, ids):
    return logits(stock_model(tiny.product), ids)


@pytest.fixture
def edited(tiny, tmp_path):
    """Writes the checkpoint again with changes to config.json and to the tensors."""

    def write(tensors=None, **config):
        folder = tmp_path / "edited"
        folder.mkdir()
        for file in tiny.path.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        write_config(folder, {**read_config(folder), **config})
        if tensors is not None:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


def down(model, path):
    return model.gpt_neox.get_submodule(path).down.weight


def test_one_tensor_with_one_name(tiny, model):
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert f"gpt_neox.{OWNER}.down.weight" in names
    assert f"gpt_neox.{SHARER}.down.weight" not in names
    assert model.gpt_neox.get_submodule(SHARER).owner is model.gpt_neox.get_submodule(OWNER)
    assert set(model.state_dict()) == set(tiny.tensors)
    assert model.num_parameters() == sum(tensor.numel() for tensor in tiny.tensors.values())


def test_a_change_reaches_every_layer_that_shares(model, tiny, ids):
    product = dict(tiny.product)
    for path in (OWNER, SHARER):
        product[f"gpt_neox.{path}.weight"] = 2 * product[f"gpt_neox.{path}.weight"]
    with torch.no_grad():
        down(model, OWNER).mul_(2)
    assert distance(logits(model, ids), logits(stock_model(product), ids)) < 5e-5


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_shares_with_itself(model, ids, expected, way):
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    layers = other.gpt_neox
    assert layers.get_submodule(SHARER).owner is layers.get_submodule(OWNER)
    assert layers.get_submodule(OWNER) is not model.gpt_neox.get_submodule(OWNER)
    with torch.no_grad():
        down(other, OWNER).zero_()
    assert distance(logits(model, ids), expected) < 2e-5
    assert distance(logits(other, ids), expected) > 0.1


@pytest.mark.parametrize("adapted", [OWNER, SHARER])
def test_lora_on_one_layer_leaves_the_other_alone(model, tiny, ids, adapted):
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[f"gpt_neox.{adapted}"]))
    names = [name for name, module in peft.named_modules() if hasattr(module, "lora_A")]
    assert names == [f"base_model.model.gpt_neox.{adapted}"]
    generator = torch.Generator().manual_seed(3)
    a, b = (p for name, p in peft.named_parameters() if "lora_" in name)
    for parameter in (a, b):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    product = dict(tiny.product)
    product[f"gpt_neox.{adapted}.weight"] = product[f"gpt_neox.{adapted}.weight"] + 2 * (b @ a).detach()
    assert distance(logits(peft.eval(), ids), logits(stock_model(product), ids)) < 2e-5


@pytest.mark.parametrize("away", [0, 1])
def test_layers_of_one_group_in_two_places(tiny, ids, expected, tmp_path, away):
    """The owner, or the layer that uses its factor, is offloaded to disk."""
    device_map = dict.fromkeys(["gpt_neox.embed_in", "gpt_neox.emb_dropout", "gpt_neox.final_layer_norm"], "cpu")
    device_map |= {"gpt_neox.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"gpt_neox.layers.{n}": "disk" if n == away else "cpu" for n in (0, 1)}
    model = load(tiny.path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert down(model, OWNER).is_meta == (away == 0)
    assert model.gpt_neox.get_submodule(SHARER).up.weight.is_meta == (away == 1)
    assert distance(logits(model, ids), expected) < 2e-5


def test_layers_of_different_outputs(tmp_path, ids):
    """Nothing but the inputs has to agree: here qkv uses the factor of the MLP's first layer."""
    paths = ["layers.0.mlp.dense_h_to_4h", "layers.0.attention.query_key_value"]
    checkpoint = write_checkpoint(tmp_path / "one", dict.fromkeys(paths, 24))
    key, tensors = "gpt_neox.layers.0.attention.query_key_value.", dict(checkpoint.tensors)
    del tensors[key + "down.weight"]
    save_file(tensors, checkpoint.path / "model.safetensors", {"format": "pt"})
    write_config(checkpoint.path, {**checkpoint.config, "svd_shared": {paths[1]: paths[0]}})
    shared = tensors["gpt_neox.layers.0.mlp.dense_h_to_4h.down.weight"]
    product = {**checkpoint.product, key + "weight": tensors[key + "up.weight"] @ shared}
    assert distance(logits(load(checkpoint.path), ids), logits(stock_model(product), ids)) < 2e-5


def test_as_high_a_rank_as_the_stack_has(tmp_path, ids):
    """Two 64 x 256 matrices are one of 128 x 256, whose rank may exceed what either could have."""
    ranks = dict.fromkeys([f"layers.{n}.mlp.dense_4h_to_h" for n in (0, 1)], 100)
    checkpoint = write_checkpoint(tmp_path / "high", ranks, "shared")
    assert distance(logits(load(checkpoint.path), ids), logits(stock_model(checkpoint.product), ids)) < 5e-5
    folder = checkpoint.path
    write_config(folder, {**checkpoint.config, "svd_ranks": dict.fromkeys(ranks, 129)})
    with pytest.raises(ValueError, match=r"is 129, but the layer is 128 x 256 with those that share its `down`"):
        load(folder)


def test_built_from_a_config(tiny, ids):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    model.load_state_dict(tiny.tensors)
    assert distance(logits(model, ids), logits(load(tiny.path), ids)) < 2e-5


def test_saved_in_pieces(tiny, model, ids, tmp_path):
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    saved = saved_tensors(tmp_path / "saved")
    assert saved.keys() == tiny.tensors.keys()
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert distance(logits(load(tmp_path / "saved"), ids), logits(model, ids)) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"svd_shared": {"layers.9.mlp.dense_h_to_4h": OWNER}}, "svd_ranks does not name 'layers.9.mlp"),
        ({"svd_shared": {SHARER: "layers.9.attention.dense"}}, "svd_ranks does not name 'layers.9.att"),
        ({"svd_shared": {SHARER: None}}, "svd_ranks does not name None"),
        ({"svd_shared": {SHARER: [OWNER]}}, "svd_ranks does not name"),
        ({"svd_shared": {SHARER: SHARER}}, "no `down` of its own"),
        ({"svd_shared": {SHARER: OWNER, OWNER: "layers.0.mlp.dense_h_to_4h"}}, "no `down` of its own"),
        ({"svd_layout": "pivoted"}, "balanced layout alone"),
    ],
)
def test_config_that_cannot_be(edited, change, words):
    with pytest.raises(ValueError, match=words):
        AutoConfig.from_pretrained(edited(**change), trust_remote_code=True)


def test_ranks_that_differ(tiny, edited):
    with pytest.raises(ValueError, match="their ranks differ: 23 and 24"):
        AutoConfig.from_pretrained(edited(svd_ranks={**tiny.ranks, SHARER: 23}), trust_remote_code=True)


def test_inputs_that_differ(tiny, edited):
    wide, narrow = "layers.1.mlp.dense_4h_to_h", "layers.0.mlp.dense_h_to_4h"
    with pytest.raises(ValueError, match="they read 256 and 64 inputs"):
        load(edited(svd_shared={**tiny.shared, wide: narrow}))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_a_factor_too_many(tiny, edited, auto):
    """Which of both is meant? transformers would drop the second one and say no more than a report."""
    key = f"gpt_neox.{SHARER}.down.weight"
    folder = edited({**tiny.tensors, key: torch.zeros(24, 64)})
    with pytest.raises(ValueError, match=f"factors of their own for layers that share.*{SHARER}.down.weight"):
        auto.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("lost", [f"{OWNER}.down.weight", f"{SHARER}.up.weight", f"{SHARER}.up.bias"])
def test_a_lost_factor(tiny, edited, lost):
    folder = edited({key: tensor for key, tensor in tiny.tensors.items() if key != f"gpt_neox.{lost}"})
    with pytest.raises(ValueError, match=f"lacks factors.*{lost}"):
        load(folder)


def test_sharing_lost_from_the_config(edited):
    with pytest.raises(ValueError, match=r"lacks factors.*layers.1.attention.dense.down.weight"):
        load(edited(svd_shared={}))


def test_every_kind_of_layer_shares(tiny):
    assert tiny.shared == {f"layers.1.{name}": f"layers.0.{name}" for name in LINEARS}


def test_compiled(model, ids, expected):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert distance(logits(compiled, ids), expected) < 2e-5


def test_rehearsed_where_blocks_are_of_several_kinds(tiny, monkeypatch):
    """As some blocks of transformers 4.57 are: one is run without values whose `down` lies in another."""
    blocks = ModelBlocks(LocalSource(tiny.path))
    for number, block in enumerate(blocks._layers):
        monkeypatch.setattr(block, "attention_type", str(number), raising=False)
    blocks.rehearse()
    assert all(parameter.is_meta for block in blocks._layers for parameter in block.parameters())
