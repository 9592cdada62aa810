#!/usr/bin/env bash
# A model quantised by torchao to 4 or 2 bits is larger than one in 8 bits, in memory and on the disk.
#
# Packages: torchao 0.18.0, transformers 5.23.0, PyTorch 2.13.0 (CPU).
# Input: a tiny LLaMA with random weights, loaded with `TorchAoConfig`: `Int8WeightOnlyConfig`, and `IntxWeightOnlyConfig` with
#   `weight_dtype` int4 and int2 in groups of 32.
# Behaviour: `IntxWeightOnlyConfig` rounds to the width that is asked for (4 bits give at most 16 values, 2 bits 4), but keeps each
#   weight in an int8 of its own; the same is written by save_pretrained. With a scale and a zero point for each group it takes
#   more bytes than 8 bits with one scale a row. Nothing is said. `Int4WeightOnlyConfig` packs, but needs the package mslk, and a
#   layer whose width is no multiple of the group is refused by an AssertionError.
# Seen: bytes of the file, type of a weight's integers and how many values they have
#   bfloat16: 2,691,752 bytes
#   int8: 1,412,592 bytes, torch.int8, 255 values
#   int4: 1,513,384 bytes, torch.int8, 16 values
#   int2: 1,513,384 bytes, torch.int8, 4 values
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
cat > "$folder/widths.py" <<'PY'
import sys
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

folder = Path(sys.argv[1])


def size(name):
    return sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
)
LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "bfloat16")
print(f"bfloat16: {size('bfloat16'):,} bytes")
groups = {"granularity": PerGroup(32)}
ways = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, **groups),
    "int2": IntxWeightOnlyConfig(weight_dtype=torch.int2, **groups),
}
for name, way in ways.items():
    model = AutoModelForCausalLM.from_pretrained(
        folder / "bfloat16", quantization_config=TorchAoConfig(way), dtype=torch.bfloat16
    )
    model.save_pretrained(folder / name)
    integers = model.model.layers[0].mlp.up_proj.weight.qdata
    assert integers.shape == (512, 256) and integers.dtype == torch.int8, integers
    print(f"{name}: {size(name):,} bytes, {integers.dtype}, {len(integers.unique())} values")
    assert len(integers.unique()) <= 2 ** int(name[3:])
assert size("int4") == size("int2") > size("int8"), "they are packed now"
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0 torchao==0.18.0
"$folder/env/bin/python" "$folder/widths.py" "$folder" 2> "$folder/err" || { tail -5 "$folder/err"; exit 1; }
echo "still so"
