"""torchao on a factored checkpoint, loaded quantised or quantised later."""

import pytest
import torch
from support.tiny_factored import DTYPE, VERSION, load, logits
from torch import nn

torchao = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.skipif(VERSION < (5,), reason="torchao of today is measured with transformers 5")


def inner(module, name):
    """The factors, and nothing else: a factored layer passes for an nn.Linear, and has no weight of its own."""
    return type(module) is nn.Linear and name.endswith((".down", ".up"))


def error(model, ids, expected):
    return ((logits(model, ids) - expected).norm() / expected.norm()).item()


def test_loaded_quantised(tiny, ids, expected):
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = load(tiny.path, quantization_config=config, device_map="cpu", **{DTYPE: torch.float32})
    factors = [module.weight for name, module in model.named_modules() if inner(module, name)]
    assert len(factors) == sum(name.endswith((".down.weight", ".up.weight")) for name in tiny.tensors)
    assert not any(type(weight) is nn.Parameter for weight in factors)
    assert 1e-4 < error(model, ids, expected) < 0.05


def test_quantised_later(model, ids, expected):
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    factors = [module.weight for name, module in model.named_modules() if inner(module, name)]
    assert not any(type(weight) is nn.Parameter for weight in factors)
    assert 1e-4 < error(model, ids, expected) < 0.05
