"""Loading a factored checkpoint with stock transformers, and refusing one that is not sound."""

import copy
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_factored import (
    DTYPE,
    GEOMETRY,
    ONE_LAYOUT,
    PIVOTED,
    UNSHARED,
    dense_tensors,
    distance,
    full_ranks,
    layer_paths,
    load,
    logits,
    read_config,
    saved_tensors,
    stock_model,
    write_checkpoint,
    write_config,
)
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

QKV = "layers.0.attention.query_key_value"
UNNAMED = "holds factors of layers that svd_ranks in its config.* does not name"


@pytest.fixture
def edited(tiny, tmp_path):
    """A function that copies the tiny checkpoint with some settings of its config changed (None: removed)."""

    def edit(**settings):
        folder = shutil.copytree(tiny.path, tmp_path / "edited")
        config = {**read_config(folder), **settings}
        write_config(folder, {key: value for key, value in config.items() if value is not None})
        return folder

    return edit


def empty(info):
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


# -- Auto classes ------------------------------------------------------------------------------------------------------


def test_causal_lm_equals_the_dense_model_of_the_products(tiny, ids, expected):
    model, info = load(tiny.path, output_loading_info=True)
    assert type(model).__name__ == "PolyglotSVDForCausalLM"
    assert empty(info)
    assert distance(logits(model, ids), expected) < 2e-5


@ONE_LAYOUT
def test_the_reference_can_tell(tiny, ids, expected):
    """Rank 24 of 64 is a real change, so equality with the truncated model means something."""
    assert distance(logits(stock_model(dense_tensors()), ids), expected) > 0.5


def test_full_rank_equals_the_original_dense_model(tmp_path, ids, layout):
    checkpoint = write_checkpoint(tmp_path / "full", full_ranks(layout), layout)
    assert distance(logits(load(checkpoint.path), ids), logits(stock_model(dense_tensors()), ids)) < 1e-4


def test_base_model(tiny, ids):
    model, info = AutoModel.from_pretrained(tiny.path, trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == "PolyglotSVDModel"
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert not info["missing_keys"]
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
        assert distance(hidden, stock_model(tiny.product).gpt_neox(ids).last_hidden_state) < 2e-5


def test_config(tiny):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    assert config.model_type == "polyglot_svd"
    assert config.svd_ranks == tiny.ranks
    assert config.svd_layout == config.to_dict()["svd_layout"] == tiny.svd_layout
    assert config.svd_shared == config.to_dict()["svd_shared"] == tiny.shared
    assert config.hidden_size == GEOMETRY["hidden_size"]


def test_parameters_are_as_many_as_the_layout_promises(tiny, model):
    """r (in + out) or r (in + out - r) per layer, or r out where the factor of another is used, and its bias."""
    saved = sum(
        (t.numel() - (m + (path not in tiny.shared) * n - (tiny.layout == "pivoted") * rank) * rank)
        for path, rank in tiny.ranks.items()
        for t in [tiny.product[f"gpt_neox.{path}.weight"]]
        for m, n in [t.shape]
    )
    assert model.num_parameters() == sum(t.numel() for t in tiny.product.values()) - saved


@PIVOTED
def test_layers_are_of_the_layout_that_the_config_names(tiny, model):
    assert type(model.gpt_neox.get_submodule(QKV)).__name__ == "AdaptablePivotedLinear"
    assert not torch.equal(model.gpt_neox.get_submodule(QKV).position, torch.arange(192))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 4), (2, 3, 4)])
def test_layers_take_inputs_of_any_shape(tiny, model, shape):
    x = torch.randn(*shape, 64)
    weight, bias = (tiny.product[f"gpt_neox.{QKV}.{name}"] for name in ("weight", "bias"))
    with torch.no_grad():
        torch.testing.assert_close(model.gpt_neox.get_submodule(QKV)(x), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


@ONE_LAYOUT
@pytest.mark.parametrize("trust", [None, False])
@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_without_trust_remote_code_it_does_not_load(tiny, auto, trust, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "n")  # None makes transformers ask
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto.from_pretrained(tiny.path, trust_remote_code=trust)


def test_layers_not_named_stay_dense(tmp_path, ids, layout):
    ranks = {QKV: 24, "layers.1.mlp.dense_4h_to_h": 7}
    checkpoint = write_checkpoint(tmp_path / "mixed", ranks, layout)
    model, info = load(checkpoint.path, output_loading_info=True)
    assert empty(info)
    assert {name for name, m in model.gpt_neox.named_modules() if hasattr(m, "rank")} == set(ranks)
    assert type(model.gpt_neox.layers[1].attention.query_key_value) is nn.Linear
    assert distance(logits(model, ids), logits(stock_model(checkpoint.product), ids)) < 2e-5


# -- how the weights get there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_dtype(tiny, ids, expected, dtype, tolerance):
    model = load(tiny.path, **{DTYPE: dtype})
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert distance(logits(model, ids), expected) < tolerance


@PIVOTED
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_positions_stay_integers(tiny, edited, ids, expected, dtype, low_cpu_mem_usage, index, tmp_path):
    folder = edited()
    stored = {key: t if t.is_floating_point() else t.to(index) for key, t in tiny.tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model = load(folder, low_cpu_mem_usage=low_cpu_mem_usage, **{DTYPE: dtype})
    for cast in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.float):
        model = cast(model)
        layer = model.gpt_neox.get_submodule(QKV)
        assert layer.position.dtype in (index, torch.int64)
        assert torch.equal(layer.position, tiny.tensors[f"gpt_neox.{QKV}.position"])
    model.save_pretrained(tmp_path / "again")
    for again in (model, load(tmp_path / "again")):
        assert distance(logits(again, ids), expected) < 0.15


@ONE_LAYOUT
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_auto_follows_the_config_in_either_spelling(edited, key, argument, tmp_path):
    """The tensors are float32, so a model in bfloat16 has its dtype from the config."""
    if argument == "dtype" and DTYPE != "dtype":
        pytest.skip("this version has no `dtype` argument")
    model = load(edited(**{"dtype": None, "torch_dtype": None, key: "bfloat16"}), **{argument: "auto"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.float().save_pretrained(tmp_path / "again")  # must not leave the other spelling behind with the old dtype
    assert {p.dtype for p in load(tmp_path / "again", **{argument: "auto"}).parameters()} == {torch.float32}


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_low_cpu_mem_usage(tiny, ids, expected, low_cpu_mem_usage):
    model = load(tiny.path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(model.gpt_neox.get_submodule(QKV), nn.Linear)
    assert distance(logits(model, ids), expected) < 2e-5


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(tiny, ids, expected, device_map):
    model = load(tiny.path, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert distance(logits(model, ids), expected) < 2e-5


def test_disk_offload(tiny, ids, expected, tmp_path):
    on_cpu = ("embed_in", "emb_dropout", "layers.0", "final_layer_norm", "rotary_emb")
    device_map = {**{f"gpt_neox.{name}": "cpu" for name in on_cpu}, "gpt_neox.layers.1": "disk", "lm_head": "cpu"}
    model = load(tiny.path, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    layer = model.gpt_neox.layers[1].mlp.dense_h_to_4h
    assert layer.up.weight.is_meta
    assert isinstance(layer, nn.Linear)
    assert distance(logits(model, ids), expected) < 2e-5


def test_sharded(model, ids, expected, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert distance(logits(load(tmp_path), ids), expected) < 2e-5


def test_state_dict_argument(tiny, ids, expected):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    cls = type(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
    model = cls.from_pretrained(None, config=config, state_dict=dict(tiny.tensors))
    assert distance(logits(model, ids), expected) < 2e-5


def test_from_config_on_meta(tiny):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert all(p.is_meta for p in model.parameters())
    assert {k: v.shape for k, v in model.state_dict().items() if k in tiny.tensors} == {
        k: v.shape for k, v in tiny.tensors.items()
    }
    # a quantizer or a serving engine may still come: the factors must be the linear layers it finds
    assert not isinstance(model.gpt_neox.get_submodule(QKV), nn.Linear)
    assert isinstance(model.gpt_neox.get_submodule(QKV).up, nn.Linear)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_from_config_initialises_the_factors(tiny, auto):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    layer = getattr(model := auto.from_config(config, trust_remote_code=True), "gpt_neox", model).get_submodule(QKV)
    assert isinstance(layer, nn.Linear)
    for weight in (layer.down.weight, layer.up.weight):
        assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert not layer.bias.any()


@PIVOTED
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_from_config_has_valid_positions(tiny, auto, ids):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=True)
    empty = empty.to_empty(device="cpu")
    for module in empty.modules():
        if hasattr(module, "position"):
            module.position.fill_(-1)
            nn.init.ones_(module.bias)
    empty.apply(empty._init_weights)
    for model in (auto.from_config(config, trust_remote_code=True), empty):
        for path in tiny.ranks:
            layer = getattr(model, "gpt_neox", model).get_submodule(path)
            assert torch.equal(layer.position, torch.arange(layer.out_features))
            assert not layer.bias.any()


@PIVOTED
def test_initialisation_after_loading_leaves_loaded_positions(tiny, ids, expected):
    """transformers 5 initialises after loading, and 4 before: there, all modules if sizes may differ."""
    model = load(tiny.path, ignore_mismatched_sizes=True)
    model.init_weights()
    assert distance(logits(model, ids), expected) < 2e-5


@ONE_LAYOUT
def test_from_config_without_ranks_is_a_dense_model(tiny):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    config.svd_ranks = {}
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model.gpt_neox.get_submodule(QKV)) is nn.Linear


def test_tied_embeddings(tiny, edited, ids):
    folder = edited(tie_word_embeddings=True)
    tensors = {k: v for k, v in tiny.tensors.items() if k != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, info = load(folder, output_loading_info=True)
    assert empty(info)
    assert model.lm_head.weight is model.gpt_neox.embed_in.weight
    tied = {**tiny.product, "lm_head.weight": tiny.product["gpt_neox.embed_in.weight"]}
    reference = logits(stock_model(tied), ids)
    assert distance(logits(model, ids), reference) < 1e-5 * reference.abs().max()
    model.save_pretrained(folder / "again")
    assert "lm_head.weight" not in saved_tensors(folder / "again")
    assert distance(logits(load(folder / "again"), ids), reference) < 1e-5 * reference.abs().max()


def test_resize_token_embeddings(model, ids, expected, tmp_path):
    model.resize_token_embeddings(GEOMETRY["vocab_size"] + 8)
    assert model.lm_head is model.embed_out is model.get_output_embeddings()
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.lm_head.weight.shape == again.gpt_neox.embed_in.weight.shape == (104, 64)
    assert distance(logits(again, ids)[..., :96], expected) < 2e-5


def test_deepcopy_is_independent(model, ids, expected):
    twin = copy.deepcopy(model)
    nn.init.zeros_(model.gpt_neox.get_submodule(QKV).up.weight)
    assert distance(logits(model, ids), expected) > 0.1
    assert distance(logits(twin, ids), expected) < 2e-5
    assert isinstance(twin.gpt_neox.get_submodule(QKV), nn.Linear)


def test_pickle(model, ids, expected):
    assert distance(logits(pickle.loads(pickle.dumps(model)), ids), expected) < 2e-5


def test_attention_implementations_agree(tiny, ids, expected):
    for name in ("eager", "sdpa"):
        model = load(tiny.path, attn_implementation=name)
        assert model.config._attn_implementation == name
        assert distance(logits(model, ids), expected) < 2e-5


# -- unsound configs and checkpoints -----------------------------------------------------------------------------------


@ONE_LAYOUT
@pytest.mark.parametrize("layout_named", ["lu", "", None, 1, ["pivoted"]])
def test_layout_that_there_is_not(tiny, layout_named):
    config_class = type(AutoConfig.from_pretrained(tiny.path, trust_remote_code=True))
    with pytest.raises(ValueError, match="svd_layout must be one of balanced, pivoted, got"):
        config_class(svd_layout=layout_named)


@UNSHARED
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_layout_that_differs_from_the_factors(tiny, edited, low_cpu_mem_usage):
    folder = edited(svd_layout={"balanced": "pivoted", "pivoted": None}[tiny.layout])
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|shape"):
        load(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match="lacks factors"):
        load(folder, ignore_mismatched_sizes=True)


@ONE_LAYOUT
@pytest.mark.parametrize("rank", [0, -3, 2.0, True, "8", None, [8]])
def test_rank_that_is_no_positive_int(tiny, edited, rank):
    folder = edited(svd_ranks={**tiny.ranks, QKV: rank})
    with pytest.raises(ValueError, match="must be a positive int"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


@UNSHARED
def test_rank_above_the_dimensions_of_the_layer(tiny, edited):
    with pytest.raises(ValueError, match="is 65, but the layer is 192 x 64"):
        load(edited(svd_ranks={**tiny.ranks, QKV: 65}))


@PIVOTED
@pytest.mark.parametrize("path", ["layers.0.attention.dense", "layers.1.mlp.dense_4h_to_h"])
def test_as_many_rows_as_the_layer_has(tiny, edited, path):
    with pytest.raises(ValueError, match=r"is 64, but the layer is 64 x .*the pivoted layout has a rank of at most 63"):
        load(edited(svd_ranks={**tiny.ranks, path: 64}))


@pytest.mark.parametrize("rank", [1, 63])
def test_lowest_and_highest_rank(tmp_path, ids, rank):
    checkpoint = write_checkpoint(tmp_path / "square", {"layers.0.attention.dense": rank}, "pivoted")
    assert distance(logits(load(checkpoint.path), ids), logits(stock_model(checkpoint.product), ids)) < 1e-4


@ONE_LAYOUT
@pytest.mark.parametrize("path", ["layers.9.mlp.dense_h_to_4h", "layers.0.attention", "embed_in", "lm_head", "", "a.b"])
def test_name_of_no_linear_layer(tiny, edited, path):
    with pytest.raises(ValueError, match="not a linear layer"):
        load(edited(svd_ranks={**tiny.ranks, path: 8}))


@UNSHARED
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("kept", [[], layer_paths()[1:]], ids=["none", "all but one"])
def test_factors_that_the_config_does_not_name(tiny, edited, auto, kept):
    """transformers would fill the dense layers with random numbers and print a report."""
    folder = edited(svd_ranks={path: tiny.ranks[path] for path in kept})
    with pytest.raises(ValueError, match=UNNAMED) as error:
        auto.from_pretrained(folder, trust_remote_code=True)
    assert ("and 21 more" if not kept else f"{QKV}.down.weight") in str(error.value)


@UNSHARED
def test_svd_ranks_lost_from_the_config(edited):
    with pytest.raises(ValueError, match=UNNAMED):
        load(edited(svd_ranks=None))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_ranks_without_factors(tmp_path, tiny, auto):
    ranks = {path: 24 for path in tiny.ranks if path != QKV}
    folder = write_checkpoint(tmp_path / "partly", ranks, tiny.layout).path
    write_config(folder, {**read_config(folder), "svd_ranks": tiny.ranks})
    with pytest.raises(ValueError, match="lacks factors") as error:
        auto.from_pretrained(folder, trust_remote_code=True)
    assert f"{QKV}.down.weight" in str(error.value)


# Each way of loading, and that of the base model, which has other names.
LOADED = pytest.mark.parametrize(
    ("auto", "options"),
    [
        (AutoModelForCausalLM, {"low_cpu_mem_usage": False}),
        (AutoModelForCausalLM, {"low_cpu_mem_usage": True}),
        (AutoModelForCausalLM, {"device_map": {"": "cpu"}}),
        (AutoModel, {"low_cpu_mem_usage": True}),
    ],
    ids=["plain", "low_cpu_mem_usage", "device_map", "base model"],
)


@LOADED
@pytest.mark.parametrize("lost", ["down.weight", "up.weight", "bias"])
def test_a_lost_factor(tiny, edited, lost, options, auto):
    if tiny.layout != "pivoted" and lost == "bias":
        lost = "up.bias"
    refused_without(lost, tiny, edited(), options, auto)


@PIVOTED
@LOADED
def test_lost_positions(tiny, edited, options, auto):
    """Above all no identity in their place."""
    refused_without("position", tiny, edited(), options, auto)


def refused_without(lost, tiny, folder, options, auto):
    key = f"gpt_neox.{QKV}.{lost}"
    assert key in tiny.tensors
    save_file({k: v for k, v in tiny.tensors.items() if k != key}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks factors.*{QKV}.{lost}"):
        auto.from_pretrained(folder, trust_remote_code=True, **options)


@PIVOTED
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("name", ["position", "bias"])
@pytest.mark.parametrize("shape", [(191,), (193,), (1, 192), (1,)])
def test_misshapen_positions_or_bias(tiny, edited, name, shape, low_cpu_mem_usage):
    folder, key = edited(), f"gpt_neox.{QKV}.{name}"
    misshapen = torch.zeros(shape, dtype=tiny.tensors[key].dtype)
    save_file({**tiny.tensors, key: misshapen}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|shape"):
        load(folder, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match=f"lacks factors.*{QKV}.{name}"):
        load(folder, ignore_mismatched_sizes=True)


def test_layers_without_bias(tmp_path, tiny, ids):
    """attention_bias=False leaves the attention's linear layers without one."""
    checkpoint = write_checkpoint(tmp_path / "no-bias", layout=tiny.layout, config={"attention_bias": False})
    without = {key: t for key, t in checkpoint.tensors.items() if not re.search(r"attention\.\w+\.(up\.)?bias", key)}
    assert len(without) == len(checkpoint.tensors) - 4
    save_file(without, checkpoint.path / "model.safetensors", {"format": "pt"})
    product = {k: v for k, v in checkpoint.product.items() if ".attention." not in k or "bias" not in k}
    model, info = load(checkpoint.path, output_loading_info=True)
    assert empty(info)
    assert model.gpt_neox.get_submodule(QKV).bias is None
    assert distance(logits(model, ids), logits(stock_model(product, attention_bias=False), ids)) < 2e-5


@UNSHARED
def test_rank_that_differs_from_the_factors(tiny, edited):
    folder = edited(svd_ranks={**tiny.ranks, QKV: 23})
    with pytest.raises(RuntimeError, match="mismatch"):
        load(folder)
    with pytest.raises(ValueError, match="lacks factors"):
        load(folder, ignore_mismatched_sizes=True)


def test_ignore_mismatched_sizes_still_serves_other_tensors(tiny, edited, ids):
    folder = edited()
    save_file({**tiny.tensors, "lm_head.weight": torch.zeros(5, 64)}, folder / "model.safetensors", {"format": "pt"})
    model = load(folder, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (96, 64)
    with torch.no_grad():
        hidden = model.gpt_neox(ids).last_hidden_state
        assert distance(hidden, stock_model(tiny.product).gpt_neox(ids).last_hidden_state) < 2e-5
