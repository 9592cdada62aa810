#!/usr/bin/env bash
# accelerate's save_model writes one of several weights that are slices of one tensor, though they do not overlap.
#
# Packages: accelerate 1.15.0, safetensors 0.8.0, torch 2.13.0.
# Input: a model of three linear layers whose weights are the rows 0-1, 2-3 and 4-5 of one matrix, as stacked projections are.
# Behaviour: safetensors' save_file writes all three. accelerate takes weights of one storage for copies of one weight, keeps
#   the first, and says in a warning that this should be OK; the file has no trace of the other two.
# Seen:
#   save_file: a.weight b.weight c.weight
#   save_model: a.weight
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HOME="$folder/home" CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0
cat > "$folder/run.py" <<'PY'
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
model = torch.nn.Module()
for name, rows in zip("abc", torch.randn(6, 4).split(2)):
    layer = torch.nn.Linear(4, 2, bias=False)
    layer.weight.data = rows
    model.add_module(name, layer)
save_file(model.state_dict(), f"{folder}/plain.safetensors")
Accelerator(cpu=True).save_model(model, f"{folder}/saved")
written = load_file(f"{folder}/plain.safetensors")
assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())
print("save_file:", *sorted(written))
print("save_model:", *sorted(load_file(f"{folder}/saved/model.safetensors")))
PY
"$folder/venv/bin/python" "$folder/run.py" "$folder" 2> "$folder/err" | tee "$folder/out"
grep -qx "save_file: a.weight b.weight c.weight" "$folder/out"
grep -qx "save_model: a.weight" "$folder/out"
grep -q "Removed shared tensor" "$folder/err"
echo "still so"
