"""Quantizers that walk over a loaded model, done as they do it: those packages are no dependency of the tests."""

from fnmatch import fnmatch

import pytest
import torch
from support.tiny_factored import distance, logits
from torch import nn


def rounded(weight):
    """Symmetric 8-bit weights, a scale for each row."""
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return nn.Parameter((weight / scale).round() * scale, requires_grad=False)


def torchao_walk(module, path=""):
    """`quantize_` of torchao: by its filter a layer is done, anything else is searched. Returns the paths done."""
    kept = nn.modules.linear.NonDynamicallyQuantizableLinear
    if isinstance(module, nn.Linear) and hasattr(module, "weight") and not isinstance(module, kept):
        module.weight = rounded(module.weight)
        return [path]
    return [done for name, child in module.named_children() for done in torchao_walk(child, f"{path}.{name}")]


def quanto_walk(model, include="*"):
    """`quantize` of quanto: every nn.Linear is replaced by one of its own that is given the weight."""
    for name, module in list(model.named_modules()):
        if fnmatch(name, include) and isinstance(module, nn.Linear):
            weight = module.weight
            new = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta", weight.dtype)
            new = new.to_empty(device=weight.device)
            with torch.no_grad():
                new.weight = weight
                if module.bias is not None:
                    new.bias = module.bias
            new.weight = rounded(new.weight)
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new)


def error(model, ids, expected):
    return ((logits(model, ids) - expected).norm() / expected.norm()).item()


def factors(tiny):
    names = (name.removesuffix(".weight") for name in tiny.tensors if name.endswith((".down.weight", ".up.weight")))
    return {f".{name}" for name in names}


def test_filter_of_torchao(tiny, model, ids, expected):
    assert set(torchao_walk(model)) == {*factors(tiny), ".lm_head"}
    assert 1e-4 < error(model, ids, expected) < 0.05


def test_layers_replaced_as_quanto_does_it(tiny, model, ids, expected):
    with pytest.raises(RuntimeError, match=r'include=\["\*\.down", "\*\.up"\] in quanto'):
        quanto_walk(model)
    assert distance(logits(model, ids), expected) < 2e-5  # nothing was replaced before
    for include in ("*.down", "*.up"):
        quanto_walk(model, include)
    replaced = {f".{name.removesuffix('.weight')}" for name, p in model.named_parameters() if not p.requires_grad}
    assert replaced == factors(tiny)
    assert 1e-4 < error(model, ids, expected) < 0.05


def test_read_and_then_written_as_llm_compressor_does_it(model, ids, expected):
    """It looks at the weights of what it is told to quantise, then fills them with rounded values."""
    layer = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    weight = layer.weight
    values = rounded(weight)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r'ignore=\["FactoredLinear"\] in llm-compressor'):
        weight.copy_(values)
    with pytest.raises(RuntimeError, match=r'ignore=\["FactoredLinear"\] in llm-compressor'):
        layer.weight = values
    # by this name, which it looks for among a module's classes
    assert "FactoredLinear" in {cls.__name__ for cls in type(layer).__mro__}
    assert distance(logits(model, ids), expected) < 2e-5
