"""Decoding, compilation and export: the factored model does what the stock model of the same weights does."""

import shutil

import pytest
import torch
from support.tiny_factored import distance, load, logits, stock_model

NEW = 12
NO_EOS = {"eos_token_id": None, "pad_token_id": 2, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def stock(tiny):
    return stock_model(tiny.product)


@pytest.fixture(scope="module")
def shared(tiny):
    return load(tiny.path)


def generate(model, ids, **kwargs):
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**NO_EOS, **kwargs})


def greedy_by_hand(model, ids):
    for _ in range(NEW):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=["cache", "no cache", "static cache"]
)
def test_greedy(shared, stock, ids, options):
    tokens = generate(shared, ids, **options)
    assert tokens.shape == (3, 17 + NEW)
    assert torch.equal(tokens, greedy_by_hand(stock, ids))


def test_beam_search(shared, stock, ids):
    beams = generate(shared, ids, num_beams=3)
    assert torch.equal(beams, generate(stock, ids, num_beams=3))


def test_sampling(shared, stock, ids):
    tokens = []
    for model in (shared, stock):
        torch.manual_seed(0)
        tokens.append(generate(model, ids, do_sample=True, temperature=1.5))
    assert torch.equal(*tokens)


def test_left_padded_batch_equals_single_rows(shared, ids):
    lengths = (17, 9, 4)
    batch, mask = torch.full_like(ids, 2), torch.zeros_like(ids)
    for n, length in enumerate(lengths):
        batch[n, -length:], mask[n, -length:] = ids[n, :length], 1
    with torch.no_grad():
        padded = shared.generate(batch, attention_mask=mask, **NO_EOS)
    for n, length in enumerate(lengths):
        single = generate(shared, ids[n : n + 1, :length])
        assert torch.equal(padded[n, -NEW:], single[0, -NEW:])


def test_incremental_logits(shared, ids, expected):
    with torch.no_grad():
        first = shared(ids[:, :10], use_cache=True)
        rest = shared(ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    assert distance(torch.cat([first.logits, rest.logits], 1), expected) < 2e-5


def test_traces_as_one_graph(shared, ids, expected):
    torch._dynamo.reset()
    compiled = torch.compile(shared, backend="aot_eager", fullgraph=True)
    assert distance(logits(compiled, ids, use_cache=False), expected) < 2e-5


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compile(shared, ids, expected):
    torch._dynamo.reset()
    compiled = torch.compile(shared, fullgraph=True)
    assert distance(logits(compiled, ids, use_cache=False), expected) < 2e-5


def test_export(shared, ids, expected):
    program = torch.export.export(shared, (ids,), {"use_cache": False}, strict=False)
    names = {name for name, _ in program.named_parameters()}
    assert "gpt_neox.layers.0.attention.query_key_value.down.weight" in names
    with torch.no_grad():
        assert distance(program.module()(ids, use_cache=False).logits, expected) < 2e-5
