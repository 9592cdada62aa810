"""bitsandbytes on a factored checkpoint: the factors are what is quantized, and LoRA trains on top."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from support.tiny_factored import (
    DTYPE,
    TARGETS,
    VERSION,
    distance,
    full_ranks,
    layer_paths,
    load,
    logits,
    stock_model,
    write_checkpoint,
)
from torch import nn
from transformers import BitsAndBytesConfig

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.skipif(VERSION < (4, 57), reason="no bitsandbytes with CPU kernels for this transformers")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
INT8 = {"load_in_8bit": True}
METHODS = pytest.mark.parametrize(
    ("settings", "cls", "tolerance"), [(NF4, "Linear4bit", 0.4), (INT8, "Linear8bitLt", 0.05)], ids=["nf4", "int8"]
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, layout):
    """At rank 64: on CPUs with AVX512-BF16, bitsandbytes takes 4-bit layers with a multiple of 64 inputs only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-svd", full_ranks(layout), layout)


@pytest.fixture(scope="module")
def expected(tiny, ids):
    return logits(stock_model(tiny.product), ids)


def quantized(path, settings):
    config = BitsAndBytesConfig(**settings)
    return load(path, quantization_config=config, device_map="cpu", **{DTYPE: torch.float32})


@METHODS
def test_factors_are_quantized(tiny, ids, expected, settings, cls, tolerance):
    model = quantized(tiny.path, settings)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    inner = {f"gpt_neox.{path}.{side}": cls for path in tiny.ranks for side in ("down", "up")}
    inner = {name: cls for name, cls in inner.items() if name not in {f"gpt_neox.{path}.down" for path in tiny.shared}}
    adaptable = "AdaptablePivotedLinear" if tiny.layout == "pivoted" else "AdaptableSVDLinear"
    outer = {f"gpt_neox.{path}": adaptable if path in tiny.ranks else cls for path in layer_paths()}
    outer |= dict.fromkeys((f"gpt_neox.{path}" for path in tiny.shared), "AdaptableSharedSVDLinear")
    assert kinds == {**inner, **outer, "lm_head": "Linear"}
    error = (logits(model, ids) - expected).pow(2).mean().sqrt() / expected.std()
    # the coefficients of a pivoted layer are no smaller than its weights, so the roundings of its rows add up
    assert 1e-4 < error < tolerance * (2 if tiny.layout == "pivoted" else 1)


@METHODS
def test_save_and_reload(tiny, ids, settings, cls, tolerance, tmp_path):
    model = quantized(tiny.path, settings)
    model.save_pretrained(tmp_path)
    again, info = load(tmp_path, device_map="cpu", output_loading_info=True, **{DTYPE: torch.float32})
    assert not any(info.values())
    assert type(again.gpt_neox.layers[0].mlp.dense_h_to_4h.up).__name__ == cls
    assert distance(logits(again, ids), logits(model, ids)) == 0


@METHODS
def test_lora_trains_on_it(tiny, ids, settings, cls, tolerance, tmp_path):
    model = prepare_model_for_kbit_training(quantized(tiny.path, settings))
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"))
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {f"base_model.model.gpt_neox.{path}" for path in layer_paths()}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == 65_536
    assert {p.dtype for p in trainable} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(tiny.path, settings), tmp_path)
    assert distance(logits(again, ids), logits(model, ids)) < 1e-4


def layers(model, ranks, cls):
    """The outer paths of the factors of that class."""
    kinds = {name.removeprefix("gpt_neox."): type(module).__name__ for name, module in model.named_modules()}
    return {path for path in ranks if kinds[f"{path}.up"] == cls and kinds.get(f"{path}.down", cls) == cls}


@METHODS
@pytest.mark.parametrize(
    ("skipped", "ends"),
    [
        (["query_key_value"], ["query_key_value"]),
        (["attention.dense", "lm_head"], ["attention.dense"]),
        (["gpt_neox.layers.1.mlp.dense_h_to_4h"], ["layers.1.mlp.dense_h_to_4h"]),
        ([r".*\.mlp\..*h$"], ["dense_h_to_4h", "dense_4h_to_h"]),
        (["query_key_value.up", "query_key_value.down"], ["query_key_value"]),
    ],
    ids=["name", "two names", "path", "pattern", "factors"],
)
def test_skip_lists_name_outer_layers(tiny, skipped, ends, settings, cls, tolerance, tmp_path):
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=skipped)
    model = load(tiny.path, quantization_config=config, device_map="cpu", **{DTYPE: torch.float32})
    assert config.llm_int8_skip_modules == skipped
    left = {path for path in tiny.ranks if path.endswith(tuple(ends))}
    if VERSION < (5,) and skipped[0].startswith(".*"):  # transformers 4 knows no patterns
        left = set()
    model.save_pretrained(tmp_path)
    for loaded in (model, load(tmp_path, device_map="cpu", **{DTYPE: torch.float32})):
        assert layers(loaded, tiny.ranks, "Linear") == left
        assert layers(loaded, tiny.ranks, cls) == tiny.ranks.keys() - left


@METHODS
def test_merge_is_refused(tiny, settings, cls, tolerance):
    model = get_peft_model(quantized(tiny.path, settings), LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(RuntimeError, match="svdconvert fold"):
        model.merge_and_unload()


@METHODS
def test_dora_reads_the_product_of_quantized_factors(tiny, ids, settings, cls, tolerance, tmp_path):
    """Its magnitudes begin as the norms of the rows of the weight that the layer computes with."""
    base = quantized(tiny.path, settings)
    config = LoraConfig(r=4, use_dora=True, target_modules=[f"gpt_neox.{path}" for path in tiny.ranks])
    model = get_peft_model(prepare_model_for_kbit_training(base), config)
    other = quantized(tiny.path, settings).train()  # of layers in evaluation, bitsandbytes reorders the weights
    for path in tiny.ranks:
        magnitude = base.gpt_neox.get_submodule(path).lora_magnitude_vector["default"].weight
        layer = other.gpt_neox.get_submodule(path)
        with torch.no_grad():
            outputs = layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))
        assert (magnitude - outputs.norm(dim=0)).norm() < 0.02 * outputs.norm()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(tiny.path, settings), tmp_path)
    assert distance(logits(again, ids), logits(model, ids)) < 1e-4
