"""Stock PEFT on a factored checkpoint: h = B(A x) + bias + scale * LB(LA x), and no merge that loses the adapter."""

import copy
import inspect

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft import __version__ as peft_version
from support.tiny_factored import (
    GEOMETRY,
    ONE_LAYOUT,
    ROTARY_V4,
    TARGETS,
    VERSION,
    dense_tensors,
    distance,
    full_ranks,
    layer_paths,
    load,
    logits,
    saved_tensors,
    stock_model,
    write_checkpoint,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

# transformers 5.0.0 with PEFT 0.18 leaves an adapter it loads unfilled, on stock GPT-NeoX too
LOADS_ADAPTERS = pytest.mark.skipif(VERSION == (5, 0), reason="load_adapter of transformers 5.0 does not work")
PEFT = tuple(int(part) for part in peft_version.split(".")[:2])
RANK, ALPHA = 32, 48


def lora_config(**kwargs):
    return LoraConfig(
        **{
            "r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.1,
            "target_modules": TARGETS,
            "task_type": "CAUSAL_LM",
            **kwargs,
        }
    )


def fill(model, seed=3):
    """Gives the LoRA matrices random values (B starts at zero), so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def with_deltas(product, model, ranks):
    """The dense tensors plus alpha / r * LB LA of the adapter of each factored layer."""
    tensors, lora = dict(product), {name: p for name, p in model.named_parameters() if "lora_" in name}
    for path in ranks:
        (a,) = (p for name, p in lora.items() if f"{path}.lora_A" in name)
        (b,) = (p for name, p in lora.items() if f"{path}.lora_B" in name)
        tensors[f"gpt_neox.{path}.weight"] = product[f"gpt_neox.{path}.weight"] + ALPHA / RANK * (b @ a).detach()
    return tensors


@pytest.fixture
def adapted(model):
    return fill(get_peft_model(model, lora_config()))


@pytest.fixture
def adapted_logits(tiny, adapted, ids, expected):
    """Logits of the dense model W + alpha / r * LB LA."""
    reference = logits(stock_model(with_deltas(tiny.product, adapted, tiny.ranks)), ids)
    assert distance(reference, expected) > 0.1
    return reference


def test_lora_is_parallel_to_the_whole_product(adapted, ids, adapted_logits, tiny):
    assert distance(logits(adapted, ids), adapted_logits) < 2e-5
    wrapped = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert sorted(wrapped) == sorted(f"base_model.model.gpt_neox.{path}" for path in tiny.ranks)


def test_only_the_adapter_trains(adapted, ids):
    hidden, inner = GEOMETRY["hidden_size"], GEOMETRY["intermediate_size"]
    sides = (hidden + 3 * hidden) + (hidden + hidden) + 2 * (hidden + inner)
    trainable, _ = adapted.get_nb_trainable_parameters()
    assert trainable == GEOMETRY["num_hidden_layers"] * RANK * sides == 65_536
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.any(), name


def test_dropout_is_in_front_of_the_adapter_alone(model, ids):
    """With LB = 0 the adapter is silent, so neither is its dropout heard."""
    adapted = get_peft_model(model, lora_config(lora_dropout=0.9))
    quiet = logits(adapted.eval(), ids)
    assert distance(logits(adapted.train(), ids), quiet) < 1e-6
    fill(adapted)
    assert distance(logits(adapted.train(), ids), logits(adapted.eval(), ids)) > 0.1


@pytest.mark.parametrize(
    "reload",
    [
        lambda folder, base: PeftModel.from_pretrained(load(base), folder),
        lambda folder, base: AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        pytest.param(lambda folder, base: load(folder), marks=LOADS_ADAPTERS),
    ],
    ids=["PeftModel", "AutoPeftModelForCausalLM", "AutoModelForCausalLM"],
)
def test_save_and_reload(adapted, ids, adapted_logits, tiny, tmp_path, reload):
    adapted.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))
    again = reload(tmp_path, tiny.path)
    assert sum("lora_" in name for name, _ in again.named_parameters()) == 16
    assert distance(logits(again.eval(), ids), adapted_logits) < 2e-5


def test_disable_adapter(adapted, ids, expected, adapted_logits):
    with adapted.disable_adapter():
        assert distance(logits(adapted, ids), expected) < 2e-5
    assert distance(logits(adapted, ids), adapted_logits) < 2e-5


def test_unload(adapted, ids, expected):
    base = adapted.unload()
    assert not any("lora_" in name for name, _ in base.named_parameters())
    assert distance(logits(base, ids), expected) < 2e-5


@LOADS_ADAPTERS
def test_add_adapter_of_transformers(model, ids, expected, tiny, tmp_path):
    model.add_adapter(lora_config())
    reference = logits(stock_model(with_deltas(tiny.product, fill(model), tiny.ranks)), ids)
    assert distance(logits(model, ids), reference) < 2e-5
    model.disable_adapters()
    assert distance(logits(model, ids), expected) < 2e-5
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    again = load(tiny.path)
    again.load_adapter(str(tmp_path))
    assert distance(logits(again.eval(), ids), reference) < 2e-5  # 4.46 loads the adapter in training mode


def test_two_adapters(adapted, ids, adapted_logits):
    adapted.add_adapter("second", lora_config())
    adapted.set_adapter("second")
    assert distance(logits(adapted, ids), adapted_logits) > 0.1
    adapted.set_adapter("default")
    assert distance(logits(adapted, ids), adapted_logits) < 2e-5


def test_trainer(adapted, ids, tiny, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trained = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in adapted.state_dict().items()
    }
    assert all(torch.equal(trained[name], tensor) for name, tensor in tiny.tensors.items())
    again = PeftModel.from_pretrained(load(tiny.path), tmp_path / "checkpoint-6")
    assert distance(logits(again, ids), logits(adapted.eval(), ids)) < 1e-6


@pytest.mark.parametrize("rank", [24, 64], ids=["rank 24", "rank == in_features"])
@pytest.mark.parametrize("safe_merge", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_stock_merge_is_refused_and_loses_nothing(tmp_path, ids, layout, method, safe_merge, rank):
    checkpoint = write_checkpoint(tmp_path / "base", rank if rank < 64 else full_ranks(layout), layout)
    adapted = fill(get_peft_model(load(checkpoint.path), lora_config()))
    before = logits(adapted, ids)
    reference = logits(stock_model(with_deltas(checkpoint.product, adapted, layer_paths())), ids)
    merge = getattr(adapted, method)
    if safe_merge and "safe_merge" not in inspect.signature(merge).parameters:
        pytest.skip("this version of PEFT merges unsafely only")
    with pytest.raises(RuntimeError, match="to fold a LoRA adapter into the factors use `svdconvert fold`"):
        merge(**({"safe_merge": True} if safe_merge else {}))
    if len(checkpoint.ranks) == len(layer_paths()):  # a layer left dense is merged before the refusal
        assert torch.equal(logits(adapted, ids), before)
    assert distance(before, reference) < 1e-4
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(checkpoint.path), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), before)


ALL_LINEAR = {
    "all-linear": "all-linear",
    "all that is an nn.Linear": [*TARGETS, "down", "up"],
    "pattern": r".*(query_key_value|dense\w*)(\.\w+)?",
}


@pytest.mark.parametrize("targets", ALL_LINEAR.values(), ids=ALL_LINEAR)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_all_linear_layers_are_adapted_once(tiny, ids, tmp_path, targets, options):
    """As on the dense model, and the adapter fits that too."""
    adapted = get_peft_model(load(tiny.path), lora_config(target_modules=targets, **options))
    wrapped = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert sorted(wrapped) == sorted(f"base_model.model.gpt_neox.{path}" for path in tiny.ranks)
    expected = logits(fill(adapted), ids)
    adapted.save_pretrained(tmp_path)
    for base in (load(tiny.path), stock_model(tiny.product)):
        assert distance(logits(PeftModel.from_pretrained(base, tmp_path), ids), expected) < 2e-5
    assert distance(expected, logits(load(tiny.path), ids)) > 0.1
    assert torch.equal(logits(adapted.unload(), ids), logits(load(tiny.path), ids))


def test_factors_by_name_are_adapted_themselves(tiny, ids):
    adapted = get_peft_model(load(tiny.path), lora_config(target_modules=["down", "up"]))
    wrapped = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 2 * len(tiny.ranks) - len(tiny.shared)
    assert all(name.endswith((".down", ".up")) for name in wrapped)
    expected = logits(fill(adapted), ids)
    assert distance(logits(adapted.merge_and_unload(), ids), expected) < 4e-5


def biased(model, ids, bias):
    """An adapter with random values, and with biases that it trains."""
    adapted = fill(get_peft_model(model, lora_config(bias=bias)))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            assert name.endswith(".bias")
            parameter.data += 0.3
    return adapted


# PEFT 0.13 leaves the biases of "lora_only" out of the file, on dense models too
@pytest.mark.parametrize("bias", ["all", *(["lora_only"] if PEFT > (0, 13) else [])])
def test_trained_biases_are_saved(tiny, ids, tmp_path, bias):
    adapted = biased(load(tiny.path), ids, bias)
    assert len([1 for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name]) >= 8
    expected = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "first")
    if bias == "lora_only":
        dense = biased(stock_model(tiny.product), ids, bias)
        dense.save_pretrained(tmp_path / "dense")
        assert saved_tensors(tmp_path / "first").keys() == saved_tensors(tmp_path / "dense").keys()
        again = PeftModel.from_pretrained(stock_model(tiny.product), tmp_path / "first")
        assert distance(logits(again, ids), expected) < 2e-5
    again = PeftModel.from_pretrained(load(tiny.path), tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        again = PeftModel.from_pretrained(load(tiny.path), tmp_path / name)
        assert torch.equal(logits(again, ids), expected)
    assert (
        distance(logits(PeftModel.from_pretrained(load(tiny.path), tmp_path / "first").unload(), ids), expected) > 0.1
    )


@LOADS_ADAPTERS
@pytest.mark.skipif(PEFT < (0, 14), reason="PEFT 0.13 leaves these biases out, on dense models too")
def test_trained_biases_with_add_adapter_of_transformers(tiny, ids, tmp_path):
    model = load(tiny.path)
    model.add_adapter(lora_config(bias="lora_only"))
    for name, parameter in fill(model).named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data += 0.3
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        again = load(tiny.path)
        again.load_adapter(str(tmp_path / name))
        assert torch.equal(logits(again.eval(), ids), logits(model, ids))
        model = again


def test_the_models_own_tensors_keep_their_names(tiny, ids, tmp_path):
    """Whatever adapters call a bias, a checkpoint of the model has none twice."""
    adapted = biased(load(tiny.path), ids, "lora_only")
    adapted.unload().save_pretrained(tmp_path)
    assert saved_tensors(tmp_path).keys() == tiny.tensors.keys()
    again = load(tiny.path)
    again.load_state_dict(tiny.tensors)
    assert again.state_dict().keys() == tiny.tensors.keys()


def test_head_and_embedding_in_modules_to_save(model, ids, tiny, tmp_path):
    adapted = get_peft_model(model, lora_config(modules_to_save=["embed_in", "lm_head"]))
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".")[-4] for name in trainable} == {"embed_in", "lm_head"}
    nn.init.normal_(fill(adapted).base_model.model.lm_head.modules_to_save["default"].weight)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(tiny.path), tmp_path)
    assert distance(logits(again, ids), logits(adapted, ids)) < 1e-6


def test_lora_beside_layers_left_dense(tmp_path, ids, layout):
    """An adapter that touches no factored layer merges as anywhere."""
    checkpoint = write_checkpoint(tmp_path / "partly", {"layers.0.mlp.dense_h_to_4h": 24}, layout)
    adapted = fill(get_peft_model(load(checkpoint.path), lora_config(target_modules=["dense"])))
    reference = logits(adapted, ids)
    assert distance(reference, logits(load(checkpoint.path), ids)) > 0.05
    assert distance(logits(copy.deepcopy(adapted).merge_and_unload(), ids), reference) < 2e-5


def test_deltas_are_checked_against_the_original_weights(tmp_path, ids, layout):
    """At full rank the factored model with an adapter is the original model with that adapter."""
    checkpoint = write_checkpoint(tmp_path / "full", full_ranks(layout), layout)
    adapted = fill(get_peft_model(load(checkpoint.path), lora_config()))
    original = stock_model(with_deltas(dense_tensors(), adapted, layer_paths()))
    assert distance(logits(adapted, ids), logits(original, ids)) < 1e-4


# Polyglot-Ko at a rank of hidden / 4: hidden, layers, heads, inner, rank, parameters, LoRA parameters
SIZES = {
    "1.3b": (2048, 24, 16, 8192, 512, 526_503_936, 25_165_824),
    "3.8b": (3072, 32, 24, 12288, 768, 1_394_055_168, 50_331_648),
}


@ONE_LAYOUT
@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_real_models(tiny, size):
    hidden, layers, heads, inner, rank, total, trainable = SIZES[size]
    names = [path.removeprefix("layers.0.") for path in tiny.ranks if path.startswith("layers.0.")]
    config_class = type(AutoConfig.from_pretrained(tiny.path, trust_remote_code=True))
    geometry = {
        **GEOMETRY,
        **ROTARY_V4,
        "vocab_size": 30080,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    config = config_class(**geometry, svd_ranks={f"layers.{n}.{name}": rank for n in range(layers) for name in names})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert sum(p.numel() for p in model.parameters()) == total
        model.add_adapter(lora_config(r=32, lora_alpha=32))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
