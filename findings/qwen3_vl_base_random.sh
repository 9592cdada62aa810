#!/usr/bin/env bash
# In transformers 4.57 AutoModel gives a Qwen3-VL of random weights for a checkpoint that the model's own class has saved.
#
# Packages: transformers 4.57.1 and 5.23.0, torch 2.13.0.
# Input: a tiny Qwen3-VL and a tiny Qwen2.5-VL, each saved by its own class for conditional generation, and read by AutoModel, as
#   for embeddings of texts and pictures.
# Behaviour: 4.57.1 reads Qwen2.5-VL as it was saved. Of Qwen3-VL it finds no tensor, since its files name them
#   `model.language_model...` and its class has no prefix to take away, and returns a model all of whose weights are new, with a
#   warning. 5.23.0 reads the same file as it was saved.
# Seen:
#   saved by 4.57.1
#   qwen2_5_vl 4.57.1: 0 of 56 tensors missing, output differs: False
#   qwen3_vl 4.57.1: 63 of 63 tensors missing, output differs: True
#   qwen2_5_vl 5.23.0: 0 of 56 tensors missing, output differs: False
#   qwen3_vl 5.23.0: 0 of 63 tensors missing, output differs: False
# Exit status: 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_HOME="$folder/home" CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
for version in 4.57.1 5.23.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet torch==2.13.0 transformers==$version
done
cat > "$folder/save.py" <<'PY'
import sys

import torch
import transformers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
vision = dict(hidden_size=32, intermediate_size=48, depth=2, num_heads=4, out_hidden_size=32)
rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
torch.manual_seed(0)
kinds = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**text, "rope_scaling": {**rope, "type": "default"}}, vision_config=vision)
    ),
    "qwen3_vl": Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={**text, "head_dim": 8, "rope_scaling": {**rope, "mrope_interleaved": True}},
            vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        )
    ),
}
for name, model in kinds.items():
    model.eval().save_pretrained(f"{sys.argv[1]}/{name}")
    with torch.no_grad():
        output = model.model(input_ids=torch.arange(1, 9)[None]).last_hidden_state
    torch.save(output, f"{sys.argv[1]}/{name}/output.pt")
print("saved by", transformers.__version__)
PY
cat > "$folder/read.py" <<'PY'
import sys

import torch
import transformers
from transformers import AutoModel

for name in ("qwen2_5_vl", "qwen3_vl"):
    model, info = AutoModel.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(1, 9)[None]).last_hidden_state
    differs = not torch.allclose(output, torch.load(f"{sys.argv[1]}/{name}/output.pt"), atol=1e-4)
    missing, every = len(info["missing_keys"]), len(model.state_dict())
    print(f"{name} {transformers.__version__}: {missing} of {every} tensors missing, output differs: {differs}")
PY
"$folder/4.57.1/bin/python" "$folder/save.py" "$folder" 2> /dev/null | tee "$folder/out"
"$folder/4.57.1/bin/python" "$folder/read.py" "$folder" 2> "$folder/err" | tee -a "$folder/out"
"$folder/5.23.0/bin/python" "$folder/read.py" "$folder" 2> /dev/null | tee -a "$folder/out"
grep -qx "qwen2_5_vl 4.57.1: 0 of 56 tensors missing, output differs: False" "$folder/out"
grep -qx "qwen3_vl 4.57.1: 63 of 63 tensors missing, output differs: True" "$folder/out"
grep -qx "qwen2_5_vl 5.23.0: 0 of 56 tensors missing, output differs: False" "$folder/out"
grep -qx "qwen3_vl 5.23.0: 0 of 63 tensors missing, output differs: False" "$folder/out"
grep -q "newly initialized" "$folder/err"
echo "still so"
