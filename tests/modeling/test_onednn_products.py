"""Products by oneDNN: the numbers of the plain ones, and only where nobody can tell that a linear layer was not called.

The tiny layers are small and no speed is measured here, so the tests say that oneDNN is the faster one.
"""

import copy
import sys

import pytest
import torch
from support.tiny_factored import ONE_LAYOUT, TARGETS, distance, load, logits
from torch import nn

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch comes without oneDNN",
)


@pytest.fixture
def module(model):
    return sys.modules[type(model).__module__]


@pytest.fixture
def products(module, monkeypatch):
    """The weights that were multiplied by oneDNN, in order."""
    found, multiply = [], module._onednn_by_few_shapes

    def counted(x, weight, bias):
        found.append(weight)
        return multiply(x, weight, bias)

    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "_onednn_is_faster", lambda *_: True)
    monkeypatch.setattr(module, "_onednn_by_few_shapes", counted)
    return found


def factors(model, tiny):
    """The products of one pass: two a layer; one that shares multiplies with the `down` of its owner."""
    layers = [model.gpt_neox.get_submodule(path) for path in tiny.ranks]
    return [linear.weight for layer in layers for linear in (layer.inner(), layer.up)]


def same(found, expected):
    return sorted(map(id, found)) == sorted(map(id, expected))


def test_the_numbers_of_the_plain_products(tiny, model, products, ids, expected):
    assert distance(logits(model, ids), expected) < 2e-5  # float64 products of the factors, in a stock model
    assert same(products, factors(model, tiny))
    with torch.inference_mode():
        assert distance(model(ids[:, :1]).logits, expected[:, :1]) < 2e-5


def test_generation(tiny, model, products, module, monkeypatch, ids):
    found = model.generate(ids[:1], max_new_tokens=6, do_sample=False)
    assert len(products) == 6 * len(factors(model, tiny))
    monkeypatch.setattr(module, "_onednn_is_faster", lambda *_: False)
    assert torch.equal(found, model.generate(ids[:1], max_new_tokens=6, do_sample=False))
    assert len(products) == 6 * len(factors(model, tiny))


def test_few_shapes(module, products, monkeypatch):
    """However long prompts are: oneDNN keeps code for every number of rows."""
    rows, multiply = [], module._onednn

    def counted(x, *others):
        rows.append(x.numel() // x.shape[-1])
        return multiply(x, *others)

    monkeypatch.setattr(module, "_onednn", counted)
    linear, generator = nn.Linear(24, 40), torch.Generator().manual_seed(0)
    for shape in ((1, 1), (1, 16), (1, 17), (3, 33), (1, 256), (2, 150), (1, 601), (529,), (4, 2117)):
        x = torch.randn(*shape, 24, generator=generator)
        with torch.no_grad():
            found, expected = module._apply(linear, x), linear(x)
        assert found.shape == expected.shape
        assert distance(found, expected) < 1e-6
    assert len(products) == 9
    parts = (
        [1],
        [16],
        [16, 1],
        [64, 32, 3],
        [256],
        [256, 32, 12],
        [512, 64, 16, 9],
        [512, 16, 1],
        [4096, 4096, 256, 16, 4],
    )
    assert rows == [part for together in parts for part in together]


@ONE_LAYOUT
def test_chosen_by_size(module, model, products, monkeypatch, ids):
    """One routine may be the faster one for a token and the slower one for a prompt, with so many threads."""
    asked = []
    monkeypatch.setattr(module, "_onednn_is_faster", lambda *timed: asked.append(timed) or timed[0] == 1)
    for rows, timed in ((1, 1), (3, 1), (5, 16), (45, 16), (46, 128), (4096, 128)):
        for shape, outputs in (((512, 512), 2048), ((2048, 1024), 2048), ((512, 8192), 8192), ((20000, 4000), 8192)):
            assert module._prefers_onednn(rows, torch.empty(shape, device="meta")) is (timed == 1)
            assert asked.pop() == (timed, outputs, torch.get_num_threads())
    with torch.no_grad():
        model(ids)
        assert not products
        model(ids[:1, :1])
    assert products


@ONE_LAYOUT
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 19)])
def test_large_layers_as_loaded(module, shape):
    """At a size where the choice is made by measurement: whatever it is, the numbers are right."""
    generator = torch.Generator().manual_seed(3)
    layer = module.SVDLinear(1024, 1536, 512)
    x = torch.randn(*shape, 2048, generator=generator)[..., ::2]  # not contiguous
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    a, b, bias = (t.detach().double() for t in (layer.down.weight, layer.up.weight, layer.up.bias))
    with torch.no_grad():
        found = layer(x)
    assert found.shape == (*shape, 1536)
    assert distance(found, x.double() @ a.t() @ b.t() + bias) < 1e-5
    with torch.no_grad():
        assert layer(x[:, :0]).shape == (shape[0], 0, 1536)


def test_gradients_come_by_plain_products(model, products, ids):
    model(ids, labels=ids).loss.backward()
    assert not products
    assert all(p.grad is not None for p in model.parameters())


def test_weights_changed_in_place_are_used(model, products, module, monkeypatch, ids):
    """As an optimiser does it: nothing of a weight is kept between calls."""
    with torch.no_grad():
        before = model(ids).logits
        for p in model.parameters():
            p.add_(0.01)
        after = model(ids).logits
        products.clear()
        monkeypatch.setattr(module, "_onednn_is_faster", lambda *_: False)
        plain = model(ids).logits
    assert not products
    assert distance(after, before) > 1e-3
    assert distance(after, plain) < 2e-5


def test_whatever_is_around_a_factor_is_called(model, products, ids):
    """Hooks, a forward of its own (accelerate), another class: engines, quantizers, adapters, parametrizations."""
    layer = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    down, up = layer.down, layer.up
    with torch.no_grad():
        expected = model(ids).logits
        products.clear()

        calls = []
        handle = down.register_forward_hook(lambda *_: calls.append("hook"))
        up.forward = lambda x: calls.append("forward") or nn.functional.linear(x, up.weight, up.bias)
        assert distance(model(ids).logits, expected) < 2e-5
        assert calls[:2] == ["hook", "forward"]
        assert not {id(down.weight), id(up.weight)} & set(map(id, products))
        handle.remove()
        del up.forward

        calls.clear()
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
        products.clear()
        model(ids)
        handle.remove()
        assert up in calls
        assert not products

        class Other(nn.Linear):
            def forward(self, x):
                return super().forward(x) * 0

        up.__class__ = Other
        model(ids)
        assert products
        assert id(up.weight) not in set(map(id, products))
        assert not torch.any(layer.up(torch.ones(1, layer.rank)))


@ONE_LAYOUT
def test_other_modes_go_the_plain_way(model, products, ids):
    layer = model.gpt_neox.layers[0].mlp.dense_h_to_4h
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
        # no_grad leaves forward mode on, for which oneDNN has no rule; there is the derivative, and it is right
        _, tangent = torch.func.jvp(layer, (x,), (x,))
        assert distance(tangent, x.double() @ layer.product().double().t()) < 1e-5
        assert distance(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x)) < 1e-6
        products.clear()
        assert torch.jit.trace(layer, x, check_trace=False)(x).shape == (2, 3, 256)
        assert copy.deepcopy(layer).to("meta")(x.to("meta")).is_meta
        assert not products


@ONE_LAYOUT
def test_an_adapter_beside_the_layer(model, products, ids):
    """LoRA adapts the whole layer, whose two products stay; put on the factors, it is called."""
    peft = pytest.importorskip("peft")
    for targets, some in ((TARGETS, True), (["down", "up"], False)):
        settings = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(model), settings).eval()
        products.clear()
        with torch.no_grad():
            found = adapted(ids).logits
        assert bool(products) == some
        assert distance(found, adapted(ids).logits.detach()) < 2e-5  # with gradients, so by plain products


@ONE_LAYOUT
def test_layers_laid_out_for_decoding(tiny, products, module, monkeypatch, ids, expected):
    """By columns where MKL multiplies, by rows where oneDNN does; a matrix by columns is not given to oneDNN."""
    model = load(tiny.path).for_decoding()
    assert model.gpt_neox.layers[0].mlp.dense_h_to_4h.up.weight.is_contiguous()
    monkeypatch.setattr(module, "_onednn_is_faster", lambda *_: False)
    model = load(tiny.path).for_decoding()
    monkeypatch.setattr(module, "_onednn_is_faster", lambda *_: True)
    products.clear()
    assert distance(logits(model, ids), expected) < 2e-5
    assert len(products) == len(tiny.ranks)
