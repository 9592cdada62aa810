"""LLaMA-Adapter: silent at the start, the textbook's formula after, the same with and without a cache."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from examples.dialogue.llama_adapter import CONFIG, WEIGHTS, LlamaAdapterModel, load_adapter
from examples.dialogue.models import load_causal
from svdconvert import convert
from svdconvert.errors import InputError

IDS = torch.randint(3, 150, (2, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def factored_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder / "dense")
    convert(folder / "dense", folder / "r16", rank=16, device="cpu", check=False)
    return folder / "r16"


@pytest.fixture(params=["dense", "factored", "llama", "factored_llama"])
def base(request):
    if request.param == "llama":
        return llama()
    return load_causal(request.getfixturevalue(request.param), CPU).eval()


def opened(model: LlamaAdapterModel, seed: int = 0) -> LlamaAdapterModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def test_at_start_the_logits_are_those_of_the_base(base):
    before = logits(base)
    assert torch.equal(logits(LlamaAdapterModel(base, 10, 2)), before)


def test_it_is_heard_once_gates_open(base):
    before = logits(base)
    assert (logits(opened(LlamaAdapterModel(base, 10, 2))) - before).abs().max() > 0.1


def test_the_formula(dense):
    """One layer of GPT-NeoX in float64, written out: softmax(q K^T / sqrt d) V g joins the heads before `dense`."""
    base = load_causal(dense, CPU).double().eval()
    model = opened(LlamaAdapterModel(base, 5, 3)).double()
    attention = base.base_model.layers[1].attention
    adapter = attention.llama_adapter
    heard = {}
    attention.dense.register_forward_hook(lambda module, args, output: heard.update(joined=args[0]))
    attention.query_key_value.register_forward_hook(lambda module, args, output: heard.update(input=args[0]))
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: heard.update(rotary=kwargs["position_embeddings"]), with_kwargs=True
    )
    logits(model)
    heads, width = 4, 16
    weight, bias = attention.query_key_value.weight, attention.query_key_value.bias

    def projected(x, which):
        rows = torch.cat([torch.arange(width) + (3 * head + which) * width for head in range(heads)])
        return (x @ weight[rows].T + bias[rows]).unflatten(-1, (heads, width))

    with torch.no_grad():
        x, (cos, sin) = heard["input"], heard["rotary"]
        q, k, v = (projected(x, which) for which in range(3))
        turned = cos.shape[-1]

        def rotate(t):
            a, rest = t[..., :turned], t[..., turned:]
            half = torch.cat([-a[..., turned // 2 :], a[..., : turned // 2]], -1)
            return torch.cat([a * cos[:, :, None] + half * sin[:, :, None], rest], -1)

        expected = torch.zeros(2, 12, heads, width, dtype=torch.float64)
        prompt_k, prompt_v = (projected(adapter.prompt, which) for which in (1, 2))
        q, k = rotate(q), rotate(k)
        for b in range(2):
            for h in range(heads):
                scores = q[b, :, h] @ k[b, :, h].T / width**0.5
                scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
                expected[b, :, h] = scores.softmax(-1) @ v[b, :, h]
                own = (q[b, :, h] @ prompt_k[:, h].T / width**0.5).softmax(-1)
                expected[b, :, h] += adapter.gate[h] * (own @ prompt_v[:, h])
        # the softmax over the prompt is taken in float32
        assert (expected.flatten(2) - heard["joined"]).abs().max() < 1e-6


def test_cached_and_uncached_generation_agree(base):
    model = opened(LlamaAdapterModel(base, 4, 3))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0  # left padding
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "attention_mask": mask}
    cached = model.generate(input_ids=IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))


def test_only_prompts_and_gates_train(base):
    model = LlamaAdapterModel(base, 4, 2).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(name.endswith(("llama_adapter.prompt", "llama_adapter.gate")) for name in trained)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    # a closed gate hears no prompt, so at the first step only gates have a gradient
    assert all(p.grad.any() == name.endswith("gate") for name, p in model.named_parameters() if p.requires_grad)


def test_bfloat16(base):
    model = opened(LlamaAdapterModel(base.bfloat16(), 4, 2))
    assert logits(model).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).isfinite().all()


def test_a_copy_has_its_own_adapter(base):
    model = opened(LlamaAdapterModel(base, 4, 2))
    copied = opened(copy.deepcopy(model), seed=5)
    before = logits(model)
    assert (logits(copied) - before).abs().max() > 1e-2
    assert torch.equal(logits(model), before)


def test_gradient_checkpointing_gives_the_same_gradients(dense):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = opened(LlamaAdapterModel(load_causal(dense, CPU), 4, 2)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*found, strict=True):
        assert (plain - checkpointed).abs().max() < 1e-6


def test_save_and_load(base, tmp_path, request):
    fresh = copy.deepcopy(base)
    model = opened(LlamaAdapterModel(base, 4, 2, "base"))
    model.save_adapter(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG}
    assert (tmp_path / WEIGHTS).stat().st_size < 4 * 2 * (4 * 64 + 4) + 1000
    again = load_adapter(fresh, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_what_cannot_be_loaded(dense, tmp_path):
    model = LlamaAdapterModel(load_causal(dense, CPU), 4, 2)
    with pytest.raises(InputError, match="it is no LLaMA-Adapter"):
        load_adapter(load_causal(dense, CPU), tmp_path)
    model.save_adapter(tmp_path)
    with pytest.raises(InputError, match="was trained on a gpt_neox, not on a llama"):
        load_adapter(llama(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"layers": 3}))
    with pytest.raises(InputError, match="do not fit this model"):
        load_adapter(load_causal(dense, CPU), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_adapter(load_causal(dense, CPU), tmp_path)


def test_what_cannot_be_adapted(dense):
    with pytest.raises(InputError, match="the model has 3 layers"):
        LlamaAdapterModel(load_causal(dense, CPU), 10, 4)
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    with pytest.raises(InputError, match="no LLaMA-Adapter for model type 'gpt2'"):
        LlamaAdapterModel(gpt2, 10, 1)


@pytest.mark.parametrize(
    ("layers", "length", "trainable"),
    [(10, 10, 409_920), (10, 30, 1_229_120), (30, 10, 1_229_760), (30, 30, 3_687_360)],
)
def test_counts_on_llama_7b(layers, length, trainable):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    adapted = LlamaAdapterModel(model, length, layers)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == trainable
