"""Quantizers that walk over a loaded model, done as they do it: those packages are no dependency of the tests."""

from tiny_checkpoints import logits
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


def error(model, ids, expected):
    return ((logits(model, ids) - expected).norm() / expected.norm()).item()


def factors(tiny):
    names = (name.removesuffix(".weight") for name in tiny.tensors if name.endswith((".down.weight", ".up.weight")))
    return {f".{name}" for name in names}


def test_filter_of_torchao(tiny, model, ids, expected):
    assert set(torchao_walk(model)) == {*factors(tiny), ".lm_head"}
    assert 1e-4 < error(model, ids, expected) < 0.05
