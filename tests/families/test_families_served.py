"""Every family as serving engines take it: without weights at first, layers replaced, in parallel."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import (
    FAMILIES,
    VERSION,
    full_ranks,
    stock_config,
    write_family,
)
from support.pairs import Pair
from support.representatives import EACH_ONCE
from support.running import IDS, distance, load, logits
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
)

from svdconvert import convert
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.names import layer_number


def blocks_with(row: Architecture, part: str) -> int:
    """How many blocks of the tiny model have a part; all three, unless they are of several kinds."""
    kinds = row.tiny["layer_types"] if part in row.kinds else [""] * 3
    return sum(kind == row.kinds.get(part, "") for kind in kinds)


@EACH_ONCE
def test_tensor_parallel_plan(row: Architecture, pair: Pair) -> None:
    """Each rule of the stock plan goes on to `up` or `down`, by whether it splits outputs or inputs."""
    config = AutoConfig.from_pretrained(pair.factored, trust_remote_code=True)
    stock = getattr(stock_config(row.model_type), "base_model_tp_plan", None) or {}
    config.svd_ranks = {}
    if not stock and config.base_model_tp_plan:
        pytest.skip("a plan of our own where this version of transformers has none")
    # every process has all experts
    stock = {rule: style for rule, style in stock.items() if ".experts" not in rule and style != "ep_router"}
    blocks = {path.rpartition(".")[0] for path in stock}
    every = dict.fromkeys(full_ranks(row, pair.densified), 4)
    attention = {module: rank for module, rank in every.items() if ".mlp." not in module}
    first = dict(list(every.items())[:1])
    assert config.base_model_tp_plan == stock
    for ranks in (every, attention, first):
        config.svd_ranks = ranks
        plan = config.base_model_tp_plan
        # whole blocks alone, and none of which a part is factored in some layers only
        kept = {rule.removesuffix(".up").removesuffix(".down").rpartition(".")[0] for rule in plan}
        broken = {block for block in blocks if any(block[9:] in path for path in ranks)}
        unsharded = broken if config.svd_layout == "pivoted" or ranks is first else set()
        # a mixture of experts has an MLP of its own in some blocks
        alone = [path.rpartition(".")[0] for path in every if ".experts." not in path]
        unsharded |= {
            block
            for block in broken
            if len({layer_number(p) for p in alone if p.endswith(block[8:])}) < blocks_with(row, block.split(".")[2])
        }
        assert kept == blocks - unsharded
        for rule, style in plan.items():
            path, _, side = rule.rpartition(".")
            if side in ("up", "down"):
                assert any(module.endswith(path.partition("*")[2]) for module in ranks)
                assert side == ("up" if style.startswith("colwise") else "down")
                assert stock[path] == style
            else:
                assert stock[rule] == style
                assert not any(module.endswith(rule.partition("*")[2]) for module in ranks)
    assert "base_model_tp_plan" not in config.to_dict()


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo")
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/made", trust_remote_code=True, tp_plan="auto").eval()
    with torch.no_grad():
        found = model(ids).logits
    plan = model.config.base_model_tp_plan
    ends = tuple(rule.partition("*")[2] + ".weight" for rule, style in plan.items() if style[:3] in ("col", "row"))
    for name, parameter in model.named_parameters():
        if name.endswith(ends):
            assert parameter.to_local().numel() * 2 == parameter.numel(), name
    if dist.get_rank() == 0:
        torch.save(found, folder + "/parallel.pt")
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (5,), reason="native tensor parallelism on CPU is measured for transformers 5")
def test_tensor_parallel(tmp_path: Path) -> None:
    """All families that have a plan in one run of two processes: with shared factors, and with projections in parts."""
    torch.save(IDS, tmp_path / "ids.pt")
    expected = {}
    fused = [name for name in FAMILIES if ARCHITECTURES[name].fused]
    for name, split in [*((name, False) for name in FAMILIES), *((name, True) for name in fused)]:
        folder = tmp_path / f"{name}{'-split' if split else ''}"
        options: dict[str, Any] = {"share_layers": 2 if name == "mistral" else 1, "split_fused": split}
        convert(write_family(folder / "dense", name), folder / "made", keep=0.6, device="cpu", **options)
        model = load(folder / "made")
        if model.config.base_model_tp_plan:
            expected[folder] = logits(model)
    without = {
        "gpt2",
        "opt",
        "stablelm",
        "gpt_bigcode",
        "gptj",
        "gpt_neo",
        "bloom",
        "falcon",
        "mpt",
        "hunyuan_v1_dense",
        "lfm2",
        "granitemoehybrid",
        "falcon_h1",
    }
    assert len(expected) == len(set(FAMILIES) - without) + len(set(fused) - without)
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += ["--log-dir", *map(str, (tmp_path / "logs", tmp_path / "run.py", tmp_path / "ids.pt", *expected))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for folder, alone in expected.items():
        assert distance(torch.load(folder / "parallel.pt"), alone) < 1e-4, folder.name


def test_engine_that_brings_its_own_attention(row: Architecture, checkpoints: Any) -> None:
    stock_class = type(AutoModel.from_config(stock_config(row.model_type)))
    if not getattr(stock_class, "_supports_attention_backend", False):
        pytest.skip("the stock model of this version has no exchangeable attention")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        calls.append((module.layer_idx, options.get("engine")))
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["engine"] = attention
    try:
        folder = checkpoints.pair(row.model_type).factored
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config._attn_implementation = "engine"
        model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)
        with torch.no_grad():
            model(IDS, use_cache=False, engine="yes")
    finally:
        del ALL_ATTENTION_FUNCTIONS["engine"]
    # the stock layers of Nemotron hand on nothing of what they are called with
    engine = None if row.model_type == "nemotron" else "yes"
    kinds = row.tiny["layer_types"] if row.kinds else ["full_attention"] * 3
    attending = [layer for layer, kind in enumerate(kinds) if kind in ("full_attention", "attention")]
    assert calls == [(layer, engine) for layer in attending]
