"""Tensor parallelism, and what the Transformers backends of vLLM and SGLang do with a model."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from support.tiny_factored import (
    LINEARS,
    PIVOTED,
    VERSION,
    distance,
    load,
    logits,
    saved_tensors,
    stock_model,
    write_checkpoint,
)
from torch import nn
from transformers import AutoConfig, AutoModel, GPTNeoXModel

FACTORED = {
    "layers.*.attention.query_key_value.up": "colwise",
    "layers.*.attention.dense.down": "rowwise",
    "layers.*.mlp.dense_h_to_4h.up": "colwise",
    "layers.*.mlp.dense_4h_to_h.down": "rowwise",
}
DENSE = {
    "layers.*.attention.query_key_value": "colwise",
    "layers.*.attention.dense": "rowwise",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}


def items(plan, part):
    return {key: style for key, style in plan.items() if part in key}


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        (dict.fromkeys([f"layers.{n}.{name}" for n in (0, 1) for name in LINEARS], 8), FACTORED),
        ({}, DENSE),
        (
            dict.fromkeys([f"layers.{n}.{name}" for n in (0, 1) for name in LINEARS[:2]], 8),
            {**items(FACTORED, "attention"), **items(DENSE, "mlp")},
        ),
        # one pattern cannot stand for a factored and for a dense layer: the pair is not sharded
        ({"layers.0.mlp.dense_h_to_4h": 8}, items(DENSE, "attention")),
    ],
    ids=["all", "none", "attention", "one layer"],
)
def test_plan_follows_what_is_factored(tiny, ranks, plan):
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    config.svd_ranks = ranks
    if config.svd_layout == "pivoted":  # whole, and so are their partners
        plan = {key: style for key, style in plan.items() if not key.endswith((".up", ".down"))}
    assert config.base_model_tp_plan == plan
    assert "base_model_tp_plan" not in config.to_dict()


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from support.tiny_factored import load
source, folder = sys.argv[2:]
dist.init_process_group("gloo")
model = load(source, tp_plan="auto")
ids = torch.load(folder + "/ids.pt")
options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
with torch.no_grad():
    result = {
        "logits": model(ids).logits,
        "tokens": model.generate(ids, **options),
        "static": model.generate(ids, cache_implementation="static", **options),
        "local": {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if hasattr(p, "to_local")},
    }
model.train()
model(ids, labels=ids).loss.backward()
result["grads"] = {
    name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()
}
model.save_pretrained(folder + "/saved")
if dist.get_rank() == 0:
    torch.save(result, folder + "/result.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (5,), reason="native tensor parallelism on CPU is measured for transformers 5")
def test_tensor_parallel(layout, ids, tmp_path):
    """At an odd rank: what is sharded are outputs of `up` and inputs of `down`, so the ranks need not divide."""
    tiny = write_checkpoint(tmp_path / "tiny", 23, layout)
    expected = logits(stock_model(tiny.product), ids)
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += ["--log-dir", tmp_path / "logs", tmp_path / "run.py", Path(__file__).parents[1], tiny.path, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    result = torch.load(tmp_path / "result.pt")

    layer = "gpt_neox.layers.0.attention."
    if tiny.layout != "pivoted":
        assert result["local"][layer + "query_key_value.up.weight"] == (96, 23)
        assert result["local"][layer + "dense.down.weight"] == (23, 32)
        assert not {layer + "query_key_value.down.weight", layer + "dense.up.weight"} & result["local"].keys()
    else:
        assert result["local"].keys() <= {"lm_head.weight"}
    if VERSION >= (5, 15):  # 5.0 leaves the plan of the head out, for the stock model too
        assert result["local"]["lm_head.weight"] == (48, 64)
    assert distance(result["logits"], expected) < 2e-5
    stock = stock_model(tiny.product)
    tokens = stock.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert torch.equal(result["tokens"], tokens)
    assert torch.equal(result["static"], tokens)

    single = load(tiny.path)
    single(ids, labels=ids).loss.backward()
    for name, parameter in single.named_parameters():
        assert distance(result["grads"][name], parameter.grad) < 1e-5, name

    saved = saved_tensors(tmp_path / "saved")
    assert saved.keys() == tiny.tensors.keys()
    assert all(torch.equal(saved[name], tiny.tensors[name]) for name in saved)


class Served(nn.Module):
    """Stands for the linear layers of a serving engine."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight, device="cpu"))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias, device="cpu"))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def replace_linears(module, prefix=""):
    """As vLLM does it: every nn.Linear is replaced whole, anything else is searched. Returns the paths replaced."""
    replaced = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            setattr(module, name, Served(child))
            replaced.append(path)
        else:
            replaced += replace_linears(child, path + ".")
    return replaced


def test_engine_that_replaces_every_linear_layer(tiny, ids):
    """The engine builds the base model on meta, replaces what is an nn.Linear, then brings the weights itself."""
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    replaced = replace_linears(model)
    assert sorted(replaced) == sorted(
        f"{path}.{side}"
        for path in tiny.ranks
        for side in ("down", "up")
        if not (side == "down" and path in tiny.shared)
    )

    # each factor gets the style of the first rule of the plan that its path starts with
    rules = {
        re.compile(rule.replace(".", r"\.").replace("*", r"\d+")): s for rule, s in config.base_model_tp_plan.items()
    }
    styles = {path: next((s for rule, s in rules.items() if rule.match(path)), "replicated") for path in replaced}
    sharded = {
        "layers.0.attention.query_key_value.up": "colwise",
        "layers.0.attention.dense.down": "rowwise",
        "layers.0.mlp.dense_h_to_4h.up": "colwise",
        "layers.0.mlp.dense_4h_to_h.down": "rowwise",
    }
    if tiny.layout == "pivoted":
        sharded = {}
    for name in LINEARS:
        for path in (f"layers.0.{name}.down", f"layers.0.{name}.up"):
            assert styles[path] == sharded.get(path, "replicated")

    stock = stock_model(tiny.product).gpt_neox
    weights = {key.removeprefix("gpt_neox."): t for key, t in tiny.tensors.items() if key.startswith("gpt_neox.")}
    positions = {name for name in weights if name.endswith(".position")}
    assert weights.keys() == dict(model.named_parameters()).keys() | positions
    model.load_state_dict(weights, assign=True, strict=False)
    others = [(name, buffer) for name, buffer in model.named_buffers() if name not in positions]
    for (name, buffer), (stock_name, computed) in zip(others, stock.named_buffers(), strict=True):
        assert name == stock_name
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, computed.clone())
        assert buffer.shape == computed.shape
    with torch.no_grad():
        hidden = model.eval()(ids, use_cache=False).last_hidden_state
        assert distance(hidden, stock(ids, use_cache=False).last_hidden_state) < 2e-5


@PIVOTED
@pytest.mark.parametrize("buffers", ["meta", "cpu"])
def test_engine_that_loads_parameters_only_fails(tiny, ids, buffers):
    """Neither an identity nor what torch gives for an index on meta (uninitialised memory) may pass for positions."""
    config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
    with torch.device("meta") if buffers == "meta" else init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, trust_remote_code=True)
    layer = model.layers[0].mlp.dense_h_to_4h
    assert layer.up.weight.is_meta
    assert layer.position.device.type == buffers
    weights = {key.removeprefix("gpt_neox."): t for key, t in tiny.tensors.items() if key.startswith("gpt_neox.")}
    parameters = {name: t for name, t in weights.items() if t.is_floating_point()}
    model.load_state_dict(parameters, assign=True, strict=False)
    x = torch.ones(2, 64)
    with pytest.raises((RuntimeError, ValueError), match="was not loaded with"):
        layer(x)
    model.load_state_dict(weights, assign=buffers == "meta", strict=False)
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h."
    assert (
        distance(layer(x), nn.functional.linear(x, tiny.product[name + "weight"], tiny.tensors[name + "bias"])) < 2e-5
    )


@pytest.mark.skipif(
    not getattr(GPTNeoXModel, "_supports_attention_backend", False),
    reason="the stock model of this version has no exchangeable attention",
)
def test_engine_that_brings_its_own_attention(tiny, ids):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.layer_idx, kwargs["engine"]))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["engine"] = attention
    try:
        config = AutoConfig.from_pretrained(tiny.path, trust_remote_code=True)
        config._attn_implementation = "engine"
        model = AutoModel.from_pretrained(tiny.path, config=config, trust_remote_code=True)
        assert type(model)._supports_attention_backend
        with torch.no_grad():
            hidden = model(ids, use_cache=False, engine="yes").last_hidden_state
            assert distance(hidden, stock_model(tiny.product).gpt_neox(ids).last_hidden_state) < 2e-5
    finally:
        del ALL_ATTENTION_FUNCTIONS["engine"]
    assert calls == [(0, "yes"), (1, "yes")]
