"""What solving and collecting statistics take at most, as counted by the system, against what a plan counts.

Large pieces of memory are given back as soon as they are free, so that nothing but what is needed counts; a first
conversion loads what a process keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import write_tokenizer
from support.families import FAMILIES
from support.packed_experts import packed_experts

from svdconvert.families.table import ARCHITECTURES

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK) or "gpt_oss" not in FAMILIES,
    reason="the system counts no peaks, or transformers has no gpt-oss",
)
# Threads, the journal, what is read and written in small pieces, and the system's own precision.
NOISE = 5_000_000
PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from support.settled import settle
settle()
from svdconvert import Calibration, convert
from svdconvert.factoring import decompose
from svdconvert.factoring.decompose import decompose_targets
from svdconvert.jobs.pipeline import Pipeline
from svdconvert.planning import memory
memory.LAYER_GAPS = 0  # there are none here

def now(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def tracked(real):
    def run(*arguments):
        before = now("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        found = real(*arguments)
        rises.append(now("VmHWM") - before)
        return found
    return run

Pipeline.run = tracked(Pipeline.run)
plain = tracked(decompose.decompose_targets)  # with a text, most of it is running the model
warm = False
for name, options in json.loads(sys.argv[1]).items():
    if "calibration" in options:
        options["calibration"] = Calibration(options["calibration"], samples=2, length=16)
    else:
        decompose.decompose_targets = plain
    for _ in range(2 - warm):
        rises = []
        made = convert(device="cpu", workers=1, check=False, overwrite=True, **options)
    decompose.decompose_targets, warm = decompose_targets, True
    print(json.dumps([name, max(rises), made.plan.solving_bytes() - memory.BASE_BYTES]), flush=True)

from svdconvert.calibration.run import StatisticsRun
from svdconvert.models import head_sizes
from svdconvert.methods.statistics import Needs
from svdconvert.planning import expert_groups, text_memory
from svdconvert.planning.make import make_plan
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.source import LocalSource
source, text, work = LocalSource(Path(sys.argv[2])), Calibration(sys.argv[3], samples=2, length=16), Path(sys.argv[4])
expert_groups.ON_CPU = expert_groups.WEIGHTS_ON_CPU = text_memory.ON_CPU = text_memory.WEIGHTS_ON_CPU = 20_000_000
text_memory.IN_TURN_BYTES = 0  # measured of large experts, and too much for small ones
text_memory.TOKEN_BYTES = 0  # there is no tokenizer of that size
head_sizes.ON_CPU = head_sizes.HeadSizes(whole=20_000_000, part=2_000_000, tokens=1024, positions=64)
# the first one loads what a process keeps; the last one of a name counts
for method, needs in ("whiten", Needs(True)), ("whiten", Needs(True)), ("kfac", Needs(True, True)):
    made = make_plan(source, Conversion.of(keep=0.6, targets=["experts.*"], method=method, calibration=text))
    modules = [target.module for target in made.targets if ".experts." in target.module]
    run = StatisticsRun(source, text.tokens(source), needs, modules, work=work, batch_size=2)
    step, rises = tracked(lambda: next(run, None)), []
    while step() is not None:
        pass
    print(json.dumps([method, max(rises), made.passes.peak_bytes() - text_memory.TEXT_BASE_BYTES]), flush=True)
"""
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "attention_bias": True,
    "quantization_config": {"quant_method": "mxfp4"},
}
MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 40_000,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Of one kind of matrix of all experts, in bfloat16.
STACK = 2 * 64 * 512 * 512


def write_random(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model in the names and types of the published ones."""
    generator, weights = torch.Generator().manual_seed(0), {}
    stacked = "quantization_config" in config
    for name, shape in ARCHITECTURES[config["model_type"]].parameters(config).items():
        if not (stacked and ".experts." in name):
            weights[name] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    if stacked:
        weights |= packed_experts(config, 0, generator)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Conversion -> by how much memory rose, and what its plan counts beside a process that does nothing."""
    folder = tmp_path_factory.mktemp("tracked")
    packed, apart = str(write_random(folder / "mxfp4", GPT_OSS)), str(write_random(folder / "apart", MIXTURE))
    (folder / "text.txt").write_text("\n\n".join(f"tiger {i} and lion {i * i}" for i in range(100)))
    shared = {"model": apart, "keep": 0.6, "targets": ["experts.*.gate_proj"], "share_experts": True}
    known = {"method": "whiten", "calibration": str(folder / "text.txt")}
    cases: dict[str, dict[str, Any]] = {
        "copied": {"model": packed, "keep": 0.6, "targets": ["k_proj"]},
        "factored": {"model": packed, "keep": 0.6, "targets": ["experts.*"]},
        "shared": shared,
        "shared, kept": {**shared, "allocation": "global"},
        "shared, in metrics": {**shared, **known},
    }
    cases = {name: {**options, "out": str(folder / "out")} for name, options in cases.items()}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases), apart, str(folder / "text.txt"), str(folder / "work")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (rose, planned) for name, rose, planned in lines}


@pytest.mark.parametrize(
    "name", ["copied", "factored", "shared", "shared, kept", "shared, in metrics", "whiten", "kfac"]
)
def test_a_plan_says_enough(taken: dict[str, tuple[int, int]], name: str) -> None:
    rose, planned = taken[name]
    assert rose <= planned + NOISE


@pytest.mark.parametrize("name", ["shared", "shared, kept", "shared, in metrics"])
def test_experts_that_share_are_never_there_together(taken: dict[str, tuple[int, int]], name: str) -> None:
    """Neither their matrices nor their factors, which are 33 and 19 MB."""
    assert taken[name][0] < STACK


@pytest.mark.parametrize("name", ["whiten", "kfac"])
def test_statistics_of_experts_are_never_there_together(taken: dict[str, tuple[int, int]], name: str) -> None:
    """Neither they, 268 and 671 MB, nor the weights in float32, 201 MB; the sums of a group are at most 20 MB.

    Nor is the head, 82 MB, or the embedding.
    """
    rose, planned = taken[name]
    assert rose < planned < 2 * STACK
