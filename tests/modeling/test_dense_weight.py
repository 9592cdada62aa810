"""`weight` of a factored layer: its product to whoever reads it, and a refusal to whoever writes."""

import copy

import pytest
import torch
from support.tiny_factored import distance, load, logits
from torch import nn

QKV = "layers.0.attention.query_key_value"
ONES = torch.ones(192, 64)


@pytest.fixture
def layer(model):
    return model.gpt_neox.get_submodule(QKV)


@pytest.fixture
def dense(tiny):
    return tiny.product[f"gpt_neox.{QKV}.weight"]


def test_layer_is_a_linear_layer_to_others_but_owns_no_dense_weight(tiny, layer):
    assert isinstance(layer, nn.Linear)
    own = {"bias", "position"} if tiny.layout == "pivoted" else {"up.bias"}
    assert set(layer.state_dict()) == {"down.weight", "up.weight", *own}
    assert (layer.in_features, layer.out_features, layer.rank) == (64, 192, 24)
    assert "in_features=64, out_features=192, rank=24" in repr(layer)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((192, 64), torch.float32, torch.device("cpu"))
    assert layer.bias is (layer._parameters["bias"] if tiny.layout == "pivoted" else layer.up.bias)
    assert layer.bias.shape == (192,)
    assert "weight of factors" in repr(weight)


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight + 1,
        lambda weight: weight.clone(),
        lambda weight: weight.data.clone(),
        lambda weight: weight.detach().t().sum(0),
        lambda weight: weight.to(torch.float64),
        lambda weight: torch.linalg.norm(weight, dim=1),
        lambda weight: nn.functional.linear(torch.ones(2, 64), weight),
        lambda weight: ONES * weight,
        lambda weight: ONES.clone().add_(weight),
        lambda weight: torch.cat([weight[:5], weight[5:]]),
        lambda weight: torch.stack(weight.split(64)),
        lambda weight: copy.copy(weight) @ torch.ones(64),
    ],
)
def test_what_reads_it_gets_the_product(layer, dense, use):
    found = use(layer.weight)
    assert type(found) is torch.Tensor
    assert distance(found, use(dense)) < 1e-4


def test_others_than_it_get_their_gradients(layer, dense):
    """As a tuner whose update is a function of the weight it is put on."""
    factor, inputs = torch.ones(192, 64, requires_grad=True), torch.randn(5, 64)
    nn.functional.linear(inputs, layer.weight * factor).pow(2).sum().backward()
    again = torch.ones(192, 64, requires_grad=True)
    nn.functional.linear(inputs, dense * again).pow(2).sum().backward()
    assert distance(factor.grad, again.grad) < 1e-3 * again.grad.abs().max()
    assert layer.up.weight.grad is None


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer.weight.data.add_(ONES),
        lambda layer: layer.weight.copy_(ONES),
        lambda layer: layer.weight.t().add_(1),
        lambda layer: layer.weight[0].zero_(),
        lambda layer: layer.weight.view(-1).mul_(2),
        lambda layer: layer.weight.split(64)[1].zero_(),
        lambda layer: layer.weight.detach().zero_(),
        lambda layer: torch.add(ONES, ONES, out=layer.weight),
        lambda layer: torch._foreach_add_([layer.weight], 1.0),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: setattr(layer.weight, "requires_grad", True),
        lambda layer: setattr(layer.weight, "data", ONES),
        lambda layer: setattr(layer, "weight", nn.Parameter(ONES)),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight)),
        lambda layer: setattr(layer, "weight", layer.weight.t()),
        lambda layer: setattr(layer, "weight", ONES),
        lambda layer: layer.reset_parameters(),
    ],
)
def test_what_would_change_it_is_refused(model, layer, ids, expected, use):
    with pytest.raises(RuntimeError, match="svdconvert fold"):
        use(layer)
    assert distance(logits(model, ids), expected) < 2e-5


def test_another_layers_weight(model, layer, ids, expected):
    with pytest.raises(RuntimeError, match="svdconvert fold"):
        layer.weight = model.gpt_neox.layers[1].attention.query_key_value.weight
    layer.weight, layer.bias = layer.weight, layer.bias  # as PEFT 0.13 does
    assert distance(logits(model, ids), expected) < 2e-5


def test_compiled(layer, dense):
    compiled = torch.compile(lambda: layer.weight * 2, backend="eager", fullgraph=True)
    assert distance(compiled(), 2 * dense) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny, dense, dtype):
    weight = load(tiny.path).to(dtype).gpt_neox.get_submodule(QKV).weight
    assert weight.dtype == (weight * 1).dtype == dtype
    assert distance((weight * 1).float(), dense) < 0.02 * dense.abs().max()


def test_on_meta(tiny, layer):
    assert (layer.to("meta").weight + 1).is_meta
