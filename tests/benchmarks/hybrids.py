"""Hybrids: what a conversion takes (docs/families.md).

    python -m tests.benchmarks.hybrids --out FOLDER

Converts random weights in the geometry of Qwen3-Next-80B-A3B, a block of each kind with some experts: plain, and
calibrated on a text. All linear layers are factored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.experts import MEASURE, write_random
from tests.benchmarks.harness import BUNDLED, add_tokenizer

QWEN: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def main() -> None:
    """Convert twice, each in a process of its own, and compare the memory with the plan's."""
    from svdconvert import Calibration
    from svdconvert.commands.plan import plan_conversion
    from svdconvert.settings.conversion import Conversion

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=BUNDLED / "calibration.txt")
    parser.add_argument("--experts", type=int, default=8, help="of each block, of which a token passes at most ten")
    options = parser.parse_args()
    source = options.out / "source"
    if not (source / "config.json").exists():
        counts = {"num_experts": options.experts, "num_experts_per_tok": min(options.experts // 2, 10)}
        write_random(source, QWEN | counts)
        add_tokenizer(source)
    text = Calibration(str(options.text), samples=8, length=512)
    words = ["--calib", str(options.text), "--calib-samples", "8", "--calib-length", "512"]
    for name, given, more in (("plain", None, []), ("calibrated", text, words)):
        made = plan_conversion(source, Conversion.of(keep=0.6, calibration=given))
        arguments = ["svdconvert", str(source), "--keep", "0.6", "--out", str(options.out / name), "--overwrite"]
        arguments += ["--device", "cpu", "--workers", "1", *more]
        told = subprocess.check_output([sys.executable, "-c", MEASURE, *arguments], text=True)
        seconds, highest = map(float, told.split()[-2:])
        print(f"{name}, {len(made.targets)} matrices: {seconds:.0f} s", flush=True)
        print(f"highest memory {highest / 1e9:.2f} GB; planned {made.peak_bytes() / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
