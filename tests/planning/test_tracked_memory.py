"""What a conversion takes at most, as counted by the system, against what its plan counts.

Every piece of memory is given back as soon as it is free, so that nothing but what is needed counts; a first conversion
loads what a process keeps.
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
from support.families import FAMILIES

from svdconvert.families.table import ARCHITECTURES

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "gpt_oss" not in FAMILIES, reason="Linux counts it; needs gpt-oss"
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
from svdconvert.planning.memory import BASE_BYTES

def now(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def rise(options):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = now("VmRSS")
    made = convert(device="cpu", workers=1, check=False, overwrite=True, **options)
    return now("VmHWM") - before, made.plan.solving_bytes() - BASE_BYTES

for name, options in json.loads(sys.argv[1]).items():
    rise(options)
    print(json.dumps([name, *rise(options)]), flush=True)
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


def write_random(folder: Path, config: Mapping[str, Any]) -> Path:
    """A model in the names and types of the published ones."""
    generator, weights = torch.Generator().manual_seed(0), {}
    stacked = "quantization_config" in config
    for name, shape in ARCHITECTURES[config["model_type"]].parameters(config).items():
        if not (stacked and ".experts." in name):
            weights[name] = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    if stacked:
        count, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
        for stack, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            path = f"model.layers.0.mlp.experts.{stack}"
            groups = (count, rows, columns // 32)
            weights[f"{path}_blocks"] = torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=generator)
            weights[f"{path}_scales"] = torch.randint(119, 122, groups, dtype=torch.uint8, generator=generator)
            weights[f"{path}_bias"] = torch.zeros(count, rows, dtype=torch.bfloat16)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Conversion -> by how much memory rose, and by how much its plan says beside a process that does nothing."""
    folder = tmp_path_factory.mktemp("tracked")
    packed = str(write_random(folder / "mxfp4", GPT_OSS))
    cases: dict[str, dict[str, Any]] = {
        "copied": {"model": packed, "keep": 0.6, "targets": ["k_proj"]},
        "factored": {"model": packed, "keep": 0.6, "targets": ["experts.*"]},
    }
    cases = {name: {**options, "out": str(folder / "out")} for name, options in cases.items()}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "MALLOC_MMAP_THRESHOLD_": "32768",
        "MALLOC_TRIM_THRESHOLD_": "32768",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (rose, planned) for name, rose, planned in lines}


@pytest.mark.parametrize("name", ["copied", "factored"])
def test_a_plan_says_enough(taken: dict[str, tuple[int, int]], name: str) -> None:
    rose, planned = taken[name]
    assert rose <= planned + NOISE
